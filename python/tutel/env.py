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


def skip_exchange() -> bool:
    """``SKIP_A2A=1``: rows stay on their ranks (to measure all but the exchange; results are wrong)."""
    return _switch("SKIP_A2A")


def local_rank() -> int:
    """``LOCAL_RANK``: which device of this host a process uses, see :func:`launch` (default 0)."""
    return launch().local_rank


@dataclass(frozen=True)
class Launch:
    """What a launcher says about this process; one process alone where there was none.

    Attributes:
        rank: ``RANK``, ``OMPI_COMM_WORLD_RANK``, ``PMI_RANK`` or ``SLURM_PROCID``: number of this process, from 0.
        world_size: ``WORLD_SIZE``, ``OMPI_COMM_WORLD_SIZE``, ``PMI_SIZE`` or ``SLURM_NTASKS``: number of processes.
        local_rank: ``LOCAL_RANK``, ``OMPI_COMM_WORLD_LOCAL_RANK``, ``MPI_LOCALRANKID`` or ``SLURM_LOCALID``: number of
            this process on its host.
        local_size: ``LOCAL_WORLD_SIZE``, ``LOCAL_SIZE``, ``OMPI_COMM_WORLD_LOCAL_SIZE``, ``MPI_LOCALNRANKS`` or what
            ``SLURM_STEP_TASKS_PER_NODE`` says: processes of this host.
    """

    rank: int
    world_size: int
    local_rank: int
    local_size: int


def launch() -> Launch:
    """Read where the launcher placed this process: torch's variables, or else those of Open MPI, other MPIs, or Slurm.

    A negative ``LOCAL_RANK``, which some programs set for "no launcher", counts as 0. Slurm's variables count in a
    step (``srun``) only: a batch script has them too, and is one process.

    Raises:
        ValueError: If a variable is no integer, or rank and size contradict each other.
    """
    # Slurm's come last: the others' launchers may be started by it. It sets PMI's too, but no MPI_LOCALRANKID.
    ranks, sizes = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK"), ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
    local_ranks = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID")
    local_sizes = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")
    others = (*ranks[:2], *sizes[:2], "MPI_LOCALRANKID")
    slurm = not any(os.environ.get(name) for name in others) and _in_slurm_step()
    world_size = _integer(("SLURM_NTASKS",) if slurm else sizes, 1)
    rank = _integer(("SLURM_PROCID",) if slurm else ranks, 0)
    if not 0 <= rank < world_size:
        raise ValueError(
            f"the environment says rank {rank} of {world_size} processes (RANK and WORLD_SIZE, or OMPI_COMM_WORLD_RANK "
            "and OMPI_COMM_WORLD_SIZE): a rank is at least 0 and below the number of processes"
        )
    local_rank = _integer(("LOCAL_RANK", "SLURM_LOCALID") if slurm else local_ranks, 0)
    local_size = _slurm_local_size(world_size) if slurm else _integer(local_sizes, 1)
    return Launch(rank, world_size, max(local_rank, 0), max(1, min(local_size, world_size)))


def _in_slurm_step() -> bool:
    get = os.environ.get
    return bool(get("SLURM_PROCID") and get("SLURM_NTASKS")) and bool(get("SLURM_STEP_ID") or not get("SLURM_JOB_ID"))


def _slurm_local_size(world_size: int) -> int:
    """Read this host's number of tasks from a list such as ``4(x2),1``: two hosts of four, then one of one."""
    text = os.environ.get("SLURM_STEP_TASKS_PER_NODE") or os.environ.get("SLURM_TASKS_PER_NODE") or ""
    hosts: list[int] = []
    for part in filter(None, text.split(",")):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise ValueError(
                f"environment variable SLURM_STEP_TASKS_PER_NODE must be a list such as 4(x2),1, got {text!r}"
            )
        hosts += [int(match[1])] * int(match[2] or 1)
    node = _integer(("SLURM_NODEID",), 0)
    if node < len(hosts):
        return hosts[node]
    # Without the list, all tasks share the host if there is one host.
    return world_size if _integer(("SLURM_STEP_NUM_NODES", "SLURM_NNODES"), 1) == 1 else 1


@dataclass(frozen=True)
class Meeting:
    """Where the processes of a program meet.

    Attributes:
        host: ``MASTER_ADDR``: the host of rank 0.
        port: ``MASTER_PORT``, or 23456: a port there.
        attempt: ``TORCHELASTIC_RESTART_COUNT``: how often torch's launcher has started the processes again.
        by_agent: ``TORCHELASTIC_USE_AGENT_STORE``: torch's launcher listens there itself, not rank 0.
        agents: ``GROUP_WORLD_SIZE``: how many of torch's launchers there are, one a host.
    """

    host: str
    port: int
    attempt: int
    by_agent: bool
    agents: int


def meeting() -> Meeting:
    """Read where processes meet: this host if all are here, or in Slurm the first of its hosts, unless told otherwise.

    Raises:
        ValueError: If the processes are on several hosts and nothing says where they meet, or a variable is malformed.
    """
    host = os.environ.get("MASTER_ADDR", "")
    if not host:
        launched = launch()
        hosts = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_NODELIST") or ""
        if launched.local_size == launched.world_size:
            host = "localhost"
        elif hosts and _in_slurm_step():
            host = _first_host(hosts)
        else:
            raise ValueError(
                f"environment variable MASTER_ADDR must name the host of rank 0: {launched.local_size} of the "
                f"{launched.world_size} processes are on this host, and nothing says where all of them meet"
            )
    port = _integer(("MASTER_PORT",), 23456)
    if not 0 < port < 65536:
        raise ValueError(f"environment variable MASTER_PORT must be from 1 to 65535, got {port}")
    attempt = _integer(("TORCHELASTIC_RESTART_COUNT",), 0)
    by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE", "") == "True"
    return Meeting(host, port, attempt, by_agent, _integer(("GROUP_WORLD_SIZE",), 1))


def _first_host(hosts: str) -> str:
    """Return the first name of Slurm's list of hosts, such as ``node[07-09,12],other``."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", hosts)
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[0] if first else hosts)


def global_timeout() -> float:
    """``TUTEL_GLOBAL_TIMEOUT_SEC``: how long ranks wait for each other, in seconds (default 1800).

    Raises:
        ValueError: If it is not above 0.
    """
    seconds = _number("TUTEL_GLOBAL_TIMEOUT_SEC", 1800.0)
    if not 0 < seconds < 1e9:
        raise ValueError(f"environment variable TUTEL_GLOBAL_TIMEOUT_SEC must be above 0 seconds, got {seconds!r}")
    return seconds


def hierarchical_exchange() -> bool:
    """``TUTEL_ALLTOALL_ALGO=2D``: exchange inside nodes first, then across, where the caller does not say."""
    text = os.environ.get("TUTEL_ALLTOALL_ALGO", "").upper()
    if text not in ("", "1D", "2D"):
        raise ValueError(f"environment variable TUTEL_ALLTOALL_ALGO must be 1D or 2D, got {text!r}")
    return text == "2D"


def check_ranks() -> bool | None:
    """``TUTEL_CHECK_RANKS``: 1 compares what the ranks bring to each collective before it, 0 does not.

    None, where it is not set, compares on the CPU only: there a difference kills processes without a word, and a
    comparison does not make the host wait for a device.
    """
    return _switch("TUTEL_CHECK_RANKS") if os.environ.get("TUTEL_CHECK_RANKS") else None


def cuda_sandbox() -> int:
    """``TUTEL_CUDA_SANDBOX``: 2 gives each worker of the launcher its own CUDA device only (default 0)."""
    return _integer(("TUTEL_CUDA_SANDBOX",), 0)


def numa_type() -> int:
    """``NUMA_TYPE``: n binds n neighbouring local ranks to each NUMA node in turn; 0 binds nothing (default 1)."""
    return _integer(("NUMA_TYPE",), 1)


@dataclass(frozen=True)
class LauncherTask:
    """Where :mod:`tutel.launcher.run` was started: as one task of mpiexec or srun, or by hand.

    Attributes:
        rank: Number of this task, from 0, as in :class:`Launch`.
        count: Number of tasks; 0 where it was started by hand.
        here: Tasks of this host.
        by_mpi: Whether mpiexec started it, and not srun.
        local_size: ``LOCAL_SIZE``: processes that are asked for on each host; 0 where it is not set.
        master_addr: ``MASTER_ADDR``, or what is known of the first host, or "".
        master_port: ``MASTER_PORT``: where the processes meet there (default 23232).
    """

    rank: int
    count: int
    here: int
    by_mpi: bool
    local_size: int
    master_addr: str
    master_port: int


def launcher_task() -> LauncherTask:
    """Read what :mod:`tutel.launcher.run` needs to know; torch's own variables, which it sets for others, do not count.

    Raises:
        ValueError: If a variable is no integer or out of range.
    """
    # Open MPI's and MPICH's mpiexec may have been started by Slurm. Slurm too sets PMI_SIZE, but no MPI_LOCALRANKID.
    by_mpiexec = any(os.environ.get(name) for name in ("OMPI_COMM_WORLD_SIZE", "MPI_LOCALRANKID"))
    slurm = not by_mpiexec and _in_slurm_step()
    count = _integer(("SLURM_NTASKS",) if slurm else ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"), 0)
    rank = _integer(("SLURM_PROCID",) if slurm else ("OMPI_COMM_WORLD_RANK", "PMI_RANK"), 0)
    if not 0 <= rank < max(count, 1):
        raise ValueError(f"the environment says task {rank} of {count}: it must be at least 0 and below their number")
    local_sizes = ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")
    here = _slurm_local_size(count) if slurm else _integer(local_sizes, min(count, 1))
    local_size = _integer(("LOCAL_SIZE",), 0)
    if local_size < 1 and os.environ.get("LOCAL_SIZE"):
        raise ValueError(f"environment variable LOCAL_SIZE must be at least 1, got {local_size}")
    known = "localhost" if here == count else _first_host(os.environ.get("SLURM_STEP_NODELIST", "")) if slurm else ""
    port = _integer(("MASTER_PORT",), 23232)
    if not 0 < port < 65536:
        raise ValueError(f"environment variable MASTER_PORT must be from 1 to 65535, got {port}")
    address = os.environ.get("MASTER_ADDR") or known
    return LauncherTask(rank, count, here, count > 0 and not slurm, local_size, address, port)


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


def default_gloo_interface(name: str) -> None:
    """Set ``GLOO_SOCKET_IFNAME``, the network interface on which Gloo listens, unless it is set."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


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
