"""Programs and their machine, under the historic names: start-up, time, files."""

import dataclasses
import functools
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, overload

import torch
from torch import Tensor

from tutel import env
from tutel.distributed import affinity
from tutel.distributed.groups import ParallelEnvironment, divide_world
from tutel.errors import check_int

F = TypeVar("F", bound=Callable[..., Any])


def init_affinity_at_program_beginning() -> None:
    """Bind this process to the NUMA node of its local rank, within the CPUs that it may use already.

    ``NUMA_TYPE=n`` binds n neighbouring local ranks to each node in turn (default 1), ``NUMA_TYPE=0`` binds nothing.
    Threads that exist already stay where they are: call it first. Where it fails it warns, and the program goes on.
    """
    affinity.bind(env.launch().local_rank, env.numa_type())


def init_data_model_parallel(group_count: int = 1, backend: str = "nccl") -> ParallelEnvironment:
    """Join the processes that a launcher started; a program without a launcher is one process, with no process group.

    The attributes of the result can be read from this function too, and the whole from its ``default_env``.

    Args:
        group_count: How many groups of neighbouring ranks hold one model each; -n asks for groups of n ranks.
        backend: Of torch.distributed. 'nccl' computes on this process's CUDA device, or on the CPU of a machine without
            any; 'gloo' and 'mpi' compute on the CPU.

    Returns:
        The place of this process, which is also the session of :func:`get_local_session`.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If group_count does not divide the number of ranks, the backend is unknown, or the launcher's
            variables contradict each other.
        RuntimeError: If torch.distributed is built without the backend, or cannot be started.
        RankError: If other processes do not come within ``TUTEL_GLOBAL_TIMEOUT_SEC``.
    """
    session = divide_world(group_count, backend=backend)
    if session.is_cuda:
        torch.cuda.set_device(session.local_device)
    for name in [field.name for field in dataclasses.fields(session)] + ["is_cuda", "dist_print"]:
        setattr(init_data_model_parallel, name, getattr(session, name))
    setattr(init_data_model_parallel, "default_env", session)  # noqa: B010  (a function has no such attribute to mypy)
    return session


def get_local_session() -> ParallelEnvironment:
    """Return the result of the last :func:`init_data_model_parallel`.

    Raises:
        RuntimeError: If it was not called.
    """
    session = _session()
    if session is None:
        raise RuntimeError("there is no session yet: call tutel.system.init_data_model_parallel() first")
    return session


def _session() -> ParallelEnvironment | None:
    return getattr(init_data_model_parallel, "default_env", None)


# Wall-clock time that never runs backward: differences are what programs use.
_CLOCK_START = time.time() - time.perf_counter()


def record_time(is_cuda: bool | None = None) -> float:
    """Return the time in seconds, after all work of the CUDA device where one is used.

    Args:
        is_cuda: Whether to wait for the current CUDA device. None means as the session does, or, where there is none,
            if this process has used CUDA.
    """
    if is_cuda is None:
        session = _session()
        is_cuda = session.is_cuda if session is not None else torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    if is_cuda:
        torch.cuda.synchronize()
    return _CLOCK_START + time.perf_counter()


def perform(fn: Callable[[], object], num_runs: int = 100) -> float:
    """Return the average time of a call in seconds, after one call that is not counted.

    Args:
        fn: Called without arguments; its result is dropped.
        num_runs: How many calls to count.
    """
    check_int("num_runs", num_runs, at_least=1)
    fn()
    start = record_time()
    for _ in range(num_runs):
        fn()
    return (record_time() - start) / num_runs


def save(t: Tensor, path: str | Path) -> None:
    """Store a tensor's values as a NumPy file; like ``numpy.save`` it adds ``.npy`` to a path that lacks it.

    Raises:
        ImportError: If NumPy is not installed.
        TypeError: If it is no tensor, or NumPy has no such dtype (bfloat16).
    """
    if not isinstance(t, Tensor):
        raise TypeError(f"t must be a torch.Tensor, got {type(t).__name__}")
    import numpy as np

    np.save(path, t.detach().cpu().numpy(), allow_pickle=False)


def load(path: str | Path, device: torch.device | str | None = None) -> Tensor:
    """Read a tensor that :func:`save` stored; files that hold Python objects are refused.

    Args:
        path: The file, with or without its ``.npy``.
        device: Where to put the tensor; None means torch's default.

    Raises:
        ImportError: If NumPy is not installed.
        OSError: If the file cannot be read.
        ValueError: If it is no such file.
    """
    import numpy as np

    given = Path(path)
    return torch.tensor(np.load(given if given.exists() else f"{given}.npy", allow_pickle=False), device=device)


class LocalCache:
    """Values that all parts of a program share, by key."""

    _values: dict[Any, Any] = {}  # noqa: RUF012  (one for the whole process, and never replaced)

    @staticmethod
    def reset() -> None:
        """Forget all values."""
        LocalCache._values.clear()

    @staticmethod
    def set(key: Any, val: Any) -> None:
        """Keep a value."""
        LocalCache._values[key] = val

    @staticmethod
    def get(key: Any = None) -> Any:
        """Return the value of a key; the list of all values where the key has none."""
        return LocalCache._values[key] if key in LocalCache._values else list(LocalCache._values.values())


@overload
def cache() -> type[LocalCache]: ...
@overload
def cache(fn: F) -> F: ...
def cache(fn: F | None = None) -> F | type[LocalCache]:
    """Return the program's store of values; as a decorator, make a function remember its results by arguments."""
    return LocalCache if fn is None else functools.cache(fn)  # type: ignore[return-value]


def apply_rank_size_from_pattern(filename: str, rank: int, size: int, create_dir: bool = True) -> str:
    """Put a rank into the name of a file of which each rank has its own.

    Args:
        filename: ``{rank}`` and ``{size}`` in it are replaced. A name without ``{rank}`` stays as it is, with a warning
            if there are several ranks, since they would all write to it.
        rank: From 0 to size - 1.
        size: Number of ranks.
        create_dir: Make the file's folder where it is missing.

    Raises:
        TypeError: If rank or size is no integer.
        ValueError: If rank is not below size.
        OSError: If the folder cannot be made.
    """
    size = check_int("size", size, at_least=1)
    rank = check_int("rank", rank, at_least=0)
    if rank >= size:
        raise ValueError(f"rank must be below size ({size}), got {rank}")
    if size > 1 and "{rank}" not in filename:
        warnings.warn(f"{filename!r} is the same file on all {size} ranks: put {{rank}} into it", stacklevel=2)
    name = filename.replace("{rank}", str(rank)).replace("{size}", str(size))
    if create_dir:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
    return name


__all__ = [
    "apply_rank_size_from_pattern",
    "cache",
    "get_local_session",
    "init_affinity_at_program_beginning",
    "init_data_model_parallel",
    "load",
    "perform",
    "record_time",
    "save",
]
