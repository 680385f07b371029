"""Every environment variable that tutel reads, each with its meaning. Nothing else reads the environment."""

import os
from dataclasses import dataclass

from tutel.errors import one_of


def _number(name: str, default: float) -> float:
    text = os.environ.get(name, "")
    if not text:
        return default
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"environment variable {name} must be a number, got {text!r}") from None


def _integer(names: tuple[str, ...], default: int) -> int:
    """Return the first of several variables that is set."""
    for name in names:
        text = os.environ.get(name, "")
        if text:
            try:
                return int(text)
            except ValueError:
                raise ValueError(f"environment variable {name} must be an integer, got {text!r}") from None
    return default


def _switch(name: str) -> bool:
    text = os.environ.get(name, "")
    if text not in ("", "0", "1"):
        raise ValueError(f"environment variable {name} must be {one_of('01')}, got {text!r}")
    return text == "1"


def cpu_level() -> str:
    """``TUTEL_CPU_LEVEL``: the most of a processor's features that kernels use.

    portable, avx2, avx512 or avx512_bf16 (x86-64), neon (Arm); empty means all that the processor has. A level of
    another architecture limits nothing.
    """
    return os.environ.get("TUTEL_CPU_LEVEL", "")


def capacity_factor() -> float:
    """``CAP_FACTOR``: the capacity factor of gates that do not set one (default 1.0)."""
    return _number("CAP_FACTOR", 1.0)


def batch_prioritized_routing() -> bool:
    """``BATCH_PRIO=1``: serve tokens by descending score where the layer does not say."""
    return _switch("BATCH_PRIO")


def skip_moe() -> bool:
    """``SKIP_MOE=1``: layers return their input (to measure what surrounds them)."""
    return _switch("SKIP_MOE")


def skip_expert() -> bool:
    """``SKIP_EXPERT=1``: experts return their rows (to measure routing, dispatch and combine)."""
    return _switch("SKIP_EXPERT")


def ones_gate() -> bool:
    """``ONES_GATE=1``: all routing weights are 1."""
    return _switch("ONES_GATE")


def local_rank() -> int:
    """``LOCAL_RANK``: which device of this host a process uses, see :func:`launch` (default 0)."""
    return launch().local_rank


@dataclass(frozen=True)
class Launch:
    """What a launcher says about this process; one process alone where there was none.

    Attributes:
        rank: ``RANK`` or ``OMPI_COMM_WORLD_RANK``: number of this process, from 0.
        world_size: ``WORLD_SIZE`` or ``OMPI_COMM_WORLD_SIZE``: number of processes.
        local_rank: ``LOCAL_RANK`` or ``OMPI_COMM_WORLD_LOCAL_RANK``: number of this process on its host.
        local_size: ``LOCAL_WORLD_SIZE``, ``LOCAL_SIZE`` or ``OMPI_COMM_WORLD_LOCAL_SIZE``: processes of this host.
    """

    rank: int
    world_size: int
    local_rank: int
    local_size: int


def launch() -> Launch:
    """Read where the launcher placed this process: torch's variables, or else Open MPI's.

    A negative ``LOCAL_RANK``, which some programs set for "no launcher", counts as 0.

    Raises:
        ValueError: If a variable is no integer, or rank and size contradict each other.
    """
    world_size = _integer(("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE"), 1)
    rank = _integer(("RANK", "OMPI_COMM_WORLD_RANK"), 0)
    if not 0 <= rank < world_size:
        raise ValueError(
            f"the environment says rank {rank} of {world_size} processes (RANK and WORLD_SIZE, or OMPI_COMM_WORLD_RANK "
            "and OMPI_COMM_WORLD_SIZE): a rank is at least 0 and below the number of processes"
        )
    local_rank = _integer(("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"), 0)
    local_size = _integer(("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"), 1)
    return Launch(rank, world_size, max(local_rank, 0), max(1, min(local_size, world_size)))


def numa_type() -> int:
    """``NUMA_TYPE``: n binds n neighbouring local ranks to each NUMA node in turn; 0 binds nothing (default 1)."""
    return _integer(("NUMA_TYPE",), 1)


def links() -> dict[str, float]:
    """``TUTEL_LINKS``: what is known of links and need not be measured: ``intra=50e9,inter=10e9,latency=5e-6``.

    ``intra`` and ``inter`` are bytes a second that a rank sends inside its node and to other nodes, ``latency`` seconds
    a message, ``rate`` floating-point operations a second of the experts' products; each may be left out.

    Raises:
        ValueError: If it is written in another way.
    """
    found = {}
    for part in filter(None, os.environ.get("TUTEL_LINKS", "").split(",")):
        name, _, text = part.partition("=")
        try:
            number = float(text)
        except ValueError:
            number = -1.0
        if name not in _LINKS or not (0 < number < float("inf") or (name == "latency" and number == 0)):
            allowed = one_of(f"{each}=NUMBER" for each in _LINKS)
            raise ValueError(f"environment variable TUTEL_LINKS must hold {allowed}, separated by commas; got {part!r}")
        found[name] = number
    return found


_LINKS = ("intra", "inter", "latency", "rate")
