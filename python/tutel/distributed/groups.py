"""Groups of ranks, and the description of a process among them.

Symbols: W ranks of a group; G groups that they are divided into, of W / G neighbouring ranks each.

Groups are made once, and end with the group that they divide: after a new start of torch.distributed none of the old
ones is given.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import torch
from torch import distributed

from tutel import env
from tutel.distributed.failure import stage
from tutel.distributed.kept import Group, check_group, destroy_group, new_group, next_number, once
from tutel.distributed.start import check_backend, cuda_device, initialized, start, stop
from tutel.errors import check_int


def world_size(group: Group = None) -> int:
    """Return W: 1 where no process group was initialised.

    Raises:
        TypeError: If group is neither a process group nor None.
        ValueError: If this rank is no member of the group, or no group exists since torch.distributed is not started.
    """
    check_group("group", group)
    if not initialized():
        _refuse_stale(group)
        return 1
    size = distributed.get_world_size(group)
    if size < 1:
        raise ValueError(f"this rank ({distributed.get_rank()}) is no member of the group {group!r}")
    return size


def world_rank(group: Group = None) -> int:
    """Return this process's rank in a group, from 0.

    Raises:
        TypeError: As :func:`world_size` does.
        ValueError: As that does.
    """
    return distributed.get_rank(group) if world_size(group) > 1 else 0


def barrier(group: Group = None) -> None:
    """Wait until all ranks of a group have come here.

    Raises:
        RankError: If one does not.
    """
    if world_size(group) > 1:
        with stage("barrier", group):
            distributed.barrier(group)


def group_device(group: Group = None) -> torch.device:
    """Return where tensors must be that a group exchanges: the current CUDA device for NCCL, else the CPU."""
    if initialized() and "nccl" in str(distributed.get_backend(group)):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


class Division(NamedTuple):
    """A group's W ranks in blocks of neighbours.

    Attributes:
        neighbours: The ranks of this rank's block.
        strided: The ranks that have this rank's place in their blocks, a block's size apart.
    """

    neighbours: Group
    strided: Group


def divide(size: int, parent: Group = None) -> Division:
    """Cut a group into blocks of neighbouring ranks. All ranks of the parent must call this, and no others need to.

    Args:
        size: Ranks of a block, a divisor of W.
        parent: The ranks to divide; None means all.

    Returns:
        The same groups for the same arguments. ``size`` = W gives (parent, this rank alone), and 1 the reverse.

    Raises:
        TypeError: If size is no integer, or parent no group.
        ValueError: If size does not divide W, or parent does not exist (any more).
        RankError: If a rank of the parent does not come.
    """
    check_group("parent", parent)
    ranks = world_size(parent)
    size = check_int("size", size, at_least=1)
    if ranks % size != 0:
        raise ValueError(f"size must divide the number of ranks ({ranks}), got {size}")
    if ranks == 1:
        return Division(parent, parent)
    return once("divide", parent, size, lambda: _divide(size, ranks, parent))


def _divide(size: int, ranks: int, parent: Group) -> Division:
    members, rank = distributed.get_process_group_ranks(parent), world_rank(parent)
    blocks = [members[at : at + size] for at in range(0, ranks, size)]
    strides = [members[at::size] for at in range(size)]
    with stage(f"making groups of {size} ranks", parent):
        number = _agree_on_number(parent)
        if distributed.get_backend(parent) == "mpi":
            # MPI's communicators are made by all ranks of the world together.
            neighbours = _own([_part(block, parent, number, everywhere=True) for block in blocks])
            return Division(neighbours, _own([_part(stride, parent, number, everywhere=True) for stride in strides]))
        neighbours = _part(blocks[rank // size], parent, number)
        return Division(neighbours, _part(strides[rank % size], parent, number))


def _agree_on_number(parent: Group) -> int:
    """Return a number that no member of a group gave to one of its groups yet."""
    number = torch.tensor([next_number()], device=group_device(parent))
    distributed.all_reduce(number, distributed.ReduceOp.MAX, group=parent)
    return int(number.item())


def _part(members: list[int], parent: Group, number: int, *, everywhere: bool = False) -> Group:
    return parent if len(members) == world_size(parent) else new_group(members, parent, number, everywhere=everywhere)


def _own(groups: list[Group]) -> Group:
    return next(group for group in groups if group is None or group is not distributed.GroupMember.NON_GROUP_MEMBER)


def standalone_group() -> Group:
    """Return a group of this rank alone; None, the group of all, where that is this rank alone."""
    return divide(1).neighbours


def node_size(group: Group = None) -> int:
    """Return how many neighbouring ranks of a group share a host; all of its ranks must call this.

    Hosts may hold different numbers of ranks: then it is the largest number that divides all of them.

    Returns:
        A divisor of W; 1 where the ranks of a host are not neighbours in the group.
    """
    ranks = world_size(group)
    return 1 if ranks == 1 else once("node size", group, 0, lambda: _node_size(group, ranks))


def _node_size(group: Group, ranks: int) -> int:
    launched = env.launch()
    first = launched.rank - launched.local_rank
    # Where local ranks are not numbered as ranks are, nothing is known about who else is here.
    on_host = (
        range(first, first + launched.local_size) if first >= 0 and launched.local_rank < launched.local_size else ()
    )
    members = distributed.get_process_group_ranks(group)
    here = [place for place, rank in enumerate(members) if rank in on_host]
    known = bool(here) and here == list(range(here[0], here[-1] + 1))
    claims = torch.empty(ranks, dtype=torch.int64, device=group_device(group))
    with stage("node_size", group):
        distributed.all_gather_into_tensor(claims, claims.new_tensor([len(here) if known else 1]), group=group)
    size = functools.reduce(math.gcd, claims.tolist())
    return size if ranks % size == 0 else 1


@dataclasses.dataclass(frozen=True)
class ParallelEnvironment:
    """This process's place among all ranks, divided into G model groups of neighbours.

    Attributes:
        global_rank: Rank among all.
        global_size: W.
        group_count: G.
        data_rank: Number of this rank's model group, which is its rank in its data group.
        model_rank: Rank within its model group.
        model_size: W / G, ranks of a model group.
        data_group: The G ranks with this model_rank, which hold the same part of a model (a stride of W / G apart).
        model_group: The W / G neighbouring ranks that together hold one model.
        global_group: All ranks. None in each of these three is torch's default group.
        local_rank: Number of this process on its host.
        local_size: Processes on its host.
        local_device: Where this process computes.
        is_distributed: Whether torch.distributed is initialised.
    """

    global_rank: int
    global_size: int
    group_count: int
    data_rank: int
    model_rank: int
    model_size: int
    data_group: Group
    model_group: Group
    global_group: Group
    local_rank: int
    local_size: int
    local_device: torch.device
    is_distributed: bool

    @property
    def is_cuda(self) -> bool:
        """Whether this process computes on a CUDA device."""
        return self.local_device.type == "cuda"

    def dist_print(self, *values: object, **options: Any) -> None:
        """Print on the first of all ranks only; arguments are those of ``print``."""
        if self.global_rank == 0:
            print(*values, **options)


def divide_world(group_count: int, *, backend: str | None = None, parent_group: Group = None) -> ParallelEnvironment:
    """Divide a group's ranks into model groups; the same arguments give the same object.

    Args:
        group_count: G, which must divide W; a negative count -n asks for groups of n ranks.
        backend: Of torch.distributed, which is started where a launcher started several processes: 'nccl' chooses the
            CUDA device (the CPU where there is none), any other the CPU. None takes a CUDA device if there is one, and
            starts nothing.
        parent_group: The ranks to divide; None means all.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If group_count does not divide W, backend is unknown, or parent_group does not exist (any more).
        RuntimeError: If the backend is not there, or its set-up fails.
        RankError: If other ranks do not come.
    """
    check_group("parent_group", parent_group)
    launched = env.launch()
    if backend is not None:
        check_backend(backend)
        # What can be refused is refused before anybody waits.
        _group_count(group_count, world_size(parent_group) if initialized() else launched.world_size)
        start(backend)
    count = _group_count(group_count, world_size(parent_group))
    on_cuda = torch.cuda.is_available() and backend in (None, "nccl")
    key = (count, on_cuda, launched)
    return once("divide_world", parent_group, key, lambda: _place(count, on_cuda, launched, parent_group))


def _place(count: int, on_cuda: bool, launched: env.Launch, parent: Group) -> ParallelEnvironment:
    ranks, rank = world_size(parent), world_rank(parent)
    model_size = ranks // count
    model_group, data_group = divide(model_size, parent)
    return ParallelEnvironment(
        global_rank=rank,
        global_size=ranks,
        group_count=count,
        data_rank=rank // model_size,
        model_rank=rank % model_size,
        model_size=model_size,
        data_group=data_group,
        model_group=model_group,
        global_group=parent,
        local_rank=launched.local_rank,
        local_size=launched.local_size,
        local_device=cuda_device(launched.local_rank) if on_cuda else torch.device("cpu"),
        is_distributed=initialized(),
    )


def _refuse_stale(group: Group) -> None:
    if group is not None:
        raise ValueError(f"there is no group {group!r}: torch.distributed is not initialised")


def _group_count(group_count: int, ranks: int) -> int:
    count = check_int("group_count", group_count)
    if count == 0 or ranks % count != 0:
        raise ValueError(
            f"group_count must divide the number of ranks ({ranks}), or be minus the ranks of a group; got {count}"
        )
    return count if count > 0 else ranks // -count


__all__ = [
    "Division",
    "Group",
    "ParallelEnvironment",
    "barrier",
    "cuda_device",
    "destroy_group",
    "divide",
    "divide_world",
    "group_device",
    "node_size",
    "standalone_group",
    "start",
    "stop",
    "world_rank",
    "world_size",
]
