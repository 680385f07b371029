"""Groups of ranks, and the description of a process among them.

Symbols: W ranks of a group; G groups that they are divided into, of W / G neighbouring ranks each.
"""

import dataclasses
from typing import Any

import torch
from torch import distributed

from tutel import env
from tutel.errors import check_int

#: A process group; None is the group of all ranks.
Group = Any


def world_size(group: Group = None) -> int:
    """Return W: 1 where no process group was initialised.

    Raises:
        ValueError: If this rank is no member of the group, or no group exists since torch.distributed is not started.
    """
    if not _initialized():
        _refuse_stale(group)
        return 1
    size = distributed.get_world_size(group)
    if size < 1:
        raise ValueError(f"this rank ({distributed.get_rank()}) is no member of the group {group!r}")
    return size


def world_rank(group: Group = None) -> int:
    """Return this process's rank in a group, from 0.

    Raises:
        ValueError: As :func:`world_size` does.
    """
    return distributed.get_rank(group) if world_size(group) > 1 else 0


def barrier(group: Group = None) -> None:
    """Wait until all ranks of a group have come here."""
    require_one_rank("barrier", group)


def require_one_rank(what: str, group: Group = None) -> None:
    """Refuse what is not there yet for several ranks.

    Raises:
        NotImplementedError: If the group has more than one rank.
    """
    ranks = world_size(group)
    if ranks > 1:
        raise NotImplementedError(f"{what} over several ranks is not implemented yet: the group has {ranks}")


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
        backend: Of torch.distributed, which one process does not start: 'nccl' chooses the CUDA device (the CPU where
            there is none), any other the CPU. None takes a CUDA device if there is one.
        parent_group: The ranks to divide; None means all.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If group_count does not divide W, or backend is unknown.
        NotImplementedError: If there are several ranks, or a launcher started several processes to join.
    """
    require_one_rank("dividing the world into groups", parent_group)
    launched = env.launch()
    if backend is not None and not _initialized() and launched.world_size > 1:
        raise NotImplementedError(
            f"several processes are not implemented yet: the launcher started {launched.world_size}"
        )
    count = _group_count(group_count, world_size(parent_group))
    if backend is not None and backend not in _BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(_BACKENDS)}, got {backend!r}")
    on_cuda = torch.cuda.is_available() and backend in (None, "nccl")
    key = (count, parent_group, on_cuda, _initialized(), launched)
    if key not in _made:
        _made[key] = ParallelEnvironment(
            global_rank=0,
            global_size=1,
            group_count=count,
            data_rank=0,
            model_rank=0,
            model_size=1,
            data_group=parent_group,
            model_group=parent_group,
            global_group=parent_group,
            local_rank=launched.local_rank,
            local_size=launched.local_size,
            local_device=cuda_device(launched.local_rank) if on_cuda else torch.device("cpu"),
            is_distributed=_initialized(),
        )
    return _made[key]


def standalone_group() -> Group:
    """Return a group of this rank alone; None, the group of all, where that is this rank alone.

    Raises:
        NotImplementedError: If there are several ranks.
    """
    require_one_rank("a group of one rank")


def cuda_device(local_rank: int) -> torch.device:
    """Return the device of a local rank.

    Raises:
        ValueError: If this process sees several devices, but none for this rank.
    """
    devices = torch.cuda.device_count()
    if local_rank >= devices > 1:
        raise ValueError(f"local rank {local_rank} has no CUDA device of its own: this process sees {devices}")
    # A process that sees one device was given its own: TUTEL_CUDA_SANDBOX and schedulers do that.
    return torch.device("cuda", local_rank if devices > 1 else 0)


_BACKENDS = ("nccl", "gloo", "mpi")

_made: dict[tuple[int, Group, bool, bool, env.Launch], ParallelEnvironment] = {}


def _initialized() -> bool:
    return distributed.is_available() and distributed.is_initialized()


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
