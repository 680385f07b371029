"""Starting and ending torch.distributed: the processes that a launcher started meet, or say who did not come."""

import atexit
import datetime
import socket
import time
from typing import Any

import torch
from torch import distributed

from tutel import env
from tutel.distributed import failure, interface

#: Backends that programs may ask for.
BACKENDS = ("nccl", "gloo", "mpi")

_PrefixStore: Any = distributed.PrefixStore  # type: ignore[attr-defined]
_TCPStore: Any = distributed.TCPStore  # type: ignore[attr-defined]


def initialized() -> bool:
    """Whether torch.distributed is started."""
    return distributed.is_available() and distributed.is_initialized()


def start(backend: str) -> None:
    """Join the processes that a launcher started; nothing happens for one process, or where that has been done.

    Ranks wait for each other at most ``TUTEL_GLOBAL_TIMEOUT_SEC``, here and in every later collective. What ends the
    program uncaught is reported to the other ranks; at its end the groups are destroyed.

    Args:
        backend: 'nccl' takes this process's CUDA device, or Gloo on a machine without any; or 'gloo' or 'mpi'.

    Raises:
        ValueError: If the backend is unknown, or the launcher's variables contradict each other.
        RuntimeError: If this PyTorch is built without the backend, or its set-up fails.
        RankError: If other ranks do not come in time.
    """
    check_backend(backend)
    launched = env.launch()
    if launched.world_size == 1 or initialized():
        return
    if not distributed.is_available():
        raise RuntimeError(
            f"this PyTorch is built without torch.distributed: it cannot join {launched.world_size} processes"
        )
    if backend == "mpi" and not distributed.is_mpi_available():
        raise RuntimeError("this PyTorch is built without MPI: use the backend 'gloo' or 'nccl', also under mpiexec")
    on_cuda = backend == "nccl" and torch.cuda.is_available()
    if on_cuda:
        # Before the backend starts: its first collective would take device 0 on every rank.
        torch.cuda.set_device(cuda_device(launched.local_rank))
    timeout = datetime.timedelta(seconds=env.global_timeout())
    interface.tell_gloo()
    store = _meet(launched, timeout)
    failure.listen(
        _PrefixStore("failure", store),
        launched.rank,
        launched.world_size,
        held_by_rank=not env.meeting().by_agent,
    )
    distributed.init_process_group(
        "gloo" if backend == "nccl" and not on_cuda else backend,
        store=_PrefixStore("torch", store),
        rank=launched.rank,
        world_size=launched.world_size,
        timeout=timeout,
    )
    atexit.register(stop)


def stop() -> None:
    """End what :func:`start` began; it runs at the program's end too. A program that failed just ends."""
    atexit.unregister(stop)
    if failure.has_failed():
        return
    failure.silence()
    if initialized():
        distributed.destroy_process_group()


def check_backend(backend: object) -> None:
    """Check the name of a backend.

    Raises:
        ValueError: If it is unknown.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")


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


def _meet(launched: env.Launch, timeout: datetime.timedelta) -> Any:
    """Return the store in which all ranks have met.

    Raises:
        RankError: If some did not come in time; it names them.
    """
    place = env.meeting()
    who = f"rank {launched.rank} of {launched.world_size}"
    where = f"{place.host}:{place.port}"
    until = time.monotonic() + timeout.total_seconds()
    if launched.rank > 0 and (cause := _await_host(place, until)) is not None:
        text = f"{who}: start failed: rank 0 did not come to {where} within {timeout.total_seconds():g} s"
        raise failure.RankError(text, launched.rank, "start", [0]) from cause
    master = launched.rank == 0 and not place.by_agent
    store = _TCPStore(place.host, place.port, None, master, timeout, wait_for_workers=False)
    if not place.by_agent or place.agents == 1:
        # One launcher may keep its store when it starts processes again: what they wrote before must not count.
        # Several count their attempts each for itself, and make a new store each time.
        store = _PrefixStore(f"attempt {place.attempt}", store)
    try:
        missing = _missing(_PrefixStore("start", store), launched, until)
    except distributed.DistError as error:
        text = f"{who}: start failed: the store at {where} (of rank 0 or the launcher) ended before all had come"
        raise failure.RankError(text, launched.rank, "start", [0]) from error
    if missing:
        ranks = failure.ranks_as_words(missing)
        text = f"{who}: start failed: {ranks} did not come to {where} within {timeout.total_seconds():g} s"
        raise failure.RankError(text, launched.rank, "start", missing)
    return store


def _await_host(place: env.Meeting, until: float) -> OSError | None:
    """Wait until somebody listens at a place; return the last reason why not, when time is up.

    The store's own client would wait too, but several times as long as it is told.
    """
    while True:
        try:
            socket.create_connection((place.host, place.port), timeout=max(0.1, until - time.monotonic())).close()
            return None
        except OSError as error:
            if time.monotonic() > until:
                return error
            time.sleep(0.1)


def _missing(store: Any, launched: env.Launch, until: float) -> list[int]:
    """Wait for all ranks; return those that did not come in time, the same list on every rank.

    Keys: ``rank/r``, r is here; ``count``, how many are; ``outcome``, written once, by the last to come or by the first
    to lose patience: the ranks that are missing; ``read``, how many have read that.
    """
    store.set(f"rank/{launched.rank}", "")
    if store.add("count", 1) == launched.world_size:
        store.compare_set("outcome", "", "none")
    try:
        store.wait(["outcome"], datetime.timedelta(seconds=max(0.1, until - time.monotonic())))
    except distributed.DistStoreError:
        absent = [str(rank) for rank in range(launched.world_size) if not store.check([f"rank/{rank}"])]
        store.compare_set("outcome", "", ",".join(absent) or "none")
    outcome = store.get("outcome").decode()
    missing = [] if outcome == "none" else [int(rank) for rank in outcome.split(",")]
    if missing:
        _let_all_read(store, launched.world_size - len(missing), last_to_leave=launched.rank == 0)
    return missing


def _let_all_read(store: Any, readers: int, *, last_to_leave: bool) -> None:
    store.add("read", 1)
    if not last_to_leave:
        return
    until = time.monotonic() + failure.PATIENCE
    while store.add("read", 0) < readers and time.monotonic() < until:
        time.sleep(0.05)
