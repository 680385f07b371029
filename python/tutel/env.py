"""Every environment variable that tutel reads, each with its meaning. Nothing else reads the environment."""

import os
import re
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


@dataclass(frozen=True)
class LauncherTask:
    """Where :mod:`tutel.launcher.run` was started, by a launcher of one task a host or by hand.

    Attributes:
        rank: ``OMPI_COMM_WORLD_RANK`` or ``SLURM_PROCID``: number of this task, from 0.
        count: ``OMPI_COMM_WORLD_SIZE`` or ``SLURM_NTASKS``: number of tasks; 0 where nothing started tasks.
        tasks_here: ``OMPI_COMM_WORLD_LOCAL_SIZE``, or ``SLURM_NTASKS`` divided by ``SLURM_NNODES``: tasks of a host.
        local_size: ``LOCAL_SIZE``: processes that are asked for on each host; 0 where it is not set.
        master_addr: ``MASTER_ADDR``: address of the first host. Where it is not set: the first of
            ``SLURM_JOB_NODELIST`` if there are several hosts, localhost if there is one, else "".
        master_port: ``MASTER_PORT``: where the processes meet there (default 23232).
    """

    rank: int
    count: int
    tasks_here: int
    local_size: int
    master_addr: str
    master_port: int


def launcher_task() -> LauncherTask:
    """Read what :mod:`tutel.launcher.run` needs to know.

    Raises:
        ValueError: If a variable is no integer or out of range.
    """
    count = _integer(("OMPI_COMM_WORLD_SIZE", "SLURM_NTASKS"), 0)
    rank = _integer(("OMPI_COMM_WORLD_RANK", "SLURM_PROCID"), 0)
    if not 0 <= rank < max(count, 1):
        raise ValueError(f"the environment says task {rank} of {count}: it must be at least 0 and below their number")
    hosts = max(1, _integer(("SLURM_NNODES",), count))
    tasks_here = _integer(("OMPI_COMM_WORLD_LOCAL_SIZE",), -(-count // hosts))
    local_size = _integer(("LOCAL_SIZE",), 0)
    if local_size < 1 and os.environ.get("LOCAL_SIZE"):
        raise ValueError(f"environment variable LOCAL_SIZE must be at least 1, got {local_size}")
    address = os.environ.get("MASTER_ADDR") or ("localhost" if tasks_here == count else _first_slurm_host())
    port = _integer(("MASTER_PORT",), 23232)
    if not 0 < port < 65536:
        raise ValueError(f"environment variable MASTER_PORT must be a port from 1 to 65535, got {port}")
    return LauncherTask(rank, count, tasks_here, local_size, address, port)


def _first_slurm_host() -> str:
    """Return the first host of a list such as ``gpu[03-07,12],cpu1``: gpu03."""
    found = re.match(r"([^,\[]*)(?:\[(\w+)[^\]]*\]([^,\[]*))?", os.environ.get("SLURM_JOB_NODELIST", ""))
    return "".join(part or "" for part in found.groups()) if found else ""


def cuda_sandbox() -> int:
    """``TUTEL_CUDA_SANDBOX``: 2 lets each process of :mod:`tutel.launcher.run` see one CUDA device, its own."""
    return _integer(("TUTEL_CUDA_SANDBOX",), 0)


def show_one_cuda_device(local_rank: int) -> None:
    """Set ``CUDA_VISIBLE_DEVICES`` to the device of a local rank, which of those that it names where it is set.

    Raises:
        ValueError: If it names fewer.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    devices = visible.split(",") if visible else []
    if devices and local_rank >= len(devices):
        raise ValueError(f"CUDA_VISIBLE_DEVICES={visible} has no device for local rank {local_rank}")
    os.environ["CUDA_VISIBLE_DEVICES"] = devices[local_rank] if devices else str(local_rank)


def default_omp_num_threads(threads: int) -> None:
    """Set ``OMP_NUM_THREADS``, the threads of a process that is started from here, unless it is set."""
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
