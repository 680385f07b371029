"""Runs a function in several processes that have met under torch.distributed with Gloo."""

import multiprocessing
import multiprocessing.connection
import os
import pickle
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


class RanksError(RuntimeError):
    """Ranks failed, or did not end in time."""


def run_ranks(function: Callable[..., Any], world_size: int, *arguments: Any, timeout: float) -> list[Any]:
    """Run ``function(*arguments)``, one of a module, in fresh processes, and return the ranks' results.

    Raises:
        RanksError: If one fails, with its traceback, or time is up. No process is left behind.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "tutel.moe", "tutel.system"])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_be_rank, args=(folder, rank, world_size, port, timeout, function, arguments))
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        try:
            _wait(processes, timeout)
            return [_result(Path(folder) / str(rank), rank) for rank in range(world_size)]
        finally:
            for process in processes:
                process.kill()
                process.join()


def _wait(processes: list[Any], timeout: float) -> None:
    """Wait until all have ended, or one has failed, whose peers would only wait for it."""
    until = time.monotonic() + timeout
    while running := [process for process in processes if process.is_alive()]:
        if time.monotonic() > until:
            raise RanksError(f"{len(running)} of {len(processes)} ranks did not end within {timeout:.0f} s")
        if any(process.exitcode for process in processes):
            # The others notice by themselves, and say what they saw.
            until = min(until, time.monotonic() + 10)
        multiprocessing.connection.wait([process.sentinel for process in running], timeout=0.5)


def _result(path: Path, rank: int) -> Any:
    if not path.exists():
        raise RanksError(f"rank {rank} died without a word")
    failed, value = pickle.loads(path.read_bytes())
    if failed:
        raise RanksError(f"rank {rank} failed:\n{value}")
    return value


def _end_with_parent() -> None:
    """End when the program that started the ranks does: killed, it cannot end them itself."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _be_rank(
    folder: str, rank: int, world_size: int, port: int, timeout: float, function: Any, arguments: tuple[Any, ...]
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TUTEL_GLOBAL_TIMEOUT_SEC": str(int(timeout)),
    }
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import torch

    from tutel import system

    # Ranks share the machine's cores, and torch was told of all of them before it knew of other ranks.
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world_size))
    path, failed = Path(folder) / str(rank), False
    try:
        system.init_data_model_parallel(backend="gloo")
        value: Any = function(*arguments)
    except BaseException:
        failed, value = True, traceback.format_exc()
    path.with_suffix(".part").write_bytes(pickle.dumps((failed, value)))
    path.with_suffix(".part").rename(path)
    torch.distributed.destroy_process_group()
    sys.exit(int(failed))
