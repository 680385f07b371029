"""Communication between ranks, under its historic names; see :mod:`tutel.distributed.collectives`."""

from tutel.distributed.collectives import (
    all_gather,
    all_to_all,
    all_to_all_single,
    allreduce_backward,
    allreduce_forward,
    batch_all_gather_v,
    batch_all_to_all_v,
    reduce_scatter,
    simple_all_gather,
    simple_all_reduce,
    simple_all_to_all,
    simple_broadcast,
    simple_reduce_scatter,
    simple_split,
    spatial_split,
    zero_gather,
    zero_scatter,
)
from tutel.distributed.groups import Group, ParallelEnvironment, barrier, divide_world
from tutel.distributed.groups import standalone_group as create_standalone_group
from tutel.distributed.groups import world_rank as get_world_rank
from tutel.distributed.groups import world_size as get_world_size
from tutel.distributed.optimizer import DistributedOptimizer as TutelDistributedOptimizer


def create_groups_from_world(
    group_count: int, include_init: str | None = None, parent_group: Group = None
) -> ParallelEnvironment:
    """Divide the ranks into groups; the same arguments give the same object.

    Args:
        group_count: How many groups, a divisor of the number of ranks; -n asks for groups of n ranks.
        include_init: Backend of torch.distributed to start with, where it is not started yet: 'nccl', 'gloo' or 'mpi'.
        parent_group: The ranks to divide; None means all.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If group_count does not divide the number of ranks, or the backend is unknown.
        RuntimeError: If torch.distributed is built without the backend, or cannot be started.
        RankError: If other ranks do not come within ``TUTEL_GLOBAL_TIMEOUT_SEC``.
    """
    return divide_world(group_count, backend=include_init, parent_group=parent_group)


__all__ = [
    "TutelDistributedOptimizer",
    "all_gather",
    "all_to_all",
    "all_to_all_single",
    "allreduce_backward",
    "allreduce_forward",
    "barrier",
    "batch_all_gather_v",
    "batch_all_to_all_v",
    "create_groups_from_world",
    "create_standalone_group",
    "get_world_rank",
    "get_world_size",
    "reduce_scatter",
    "simple_all_gather",
    "simple_all_reduce",
    "simple_all_to_all",
    "simple_broadcast",
    "simple_reduce_scatter",
    "simple_split",
    "spatial_split",
    "zero_gather",
    "zero_scatter",
]
