"""Runs functions in several processes that have met, each under torch.distributed with Gloo.

Processes come from multiprocessing's fork server, which has imported torch and tutel already: a start costs a tenth of
a second. Results come back through files, so that nothing can fill up and block.
"""

import atexit
import dataclasses
import faulthandler
import multiprocessing
import multiprocessing.connection
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

#: What the launcher of the tests themselves may have set.
FOREIGN = ("OMPI_", "PMI_", "MPI_LOCAL", "SLURM_", "TORCHELASTIC_", "LOCAL_SIZE", "TUTEL_")


#: What each process would otherwise import for itself; the optimizers' first step imports torch's compiler.
PRELOADED = [
    *("pytest", "torch", "torch.distributed", "torch._dynamo", "torch.distributed.optim", "torch.distributed.tensor"),
    *("torch.distributed.fsdp", "tutel.moe", "tutel.net", "tutel.system", "tutel.distributed"),
]


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a rank ended.

    Attributes:
        code: Its exit code; minus the signal that killed it, None if it was still running when time was up.
        output: What it wrote to stdout and stderr.
        seconds: How long it ran, once all were there.
        result: What the function returned, if it did.
    """

    code: int | None
    output: str
    seconds: float
    result: Any = None


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 60,
    env: dict[str, str] | None = None,
) -> list[Any]:
    """Run ``function(*args)`` in fresh processes, one a rank, and return the ranks' results.

    Args:
        function: One of a module, not of another function.
        world_size: How many ranks; all of them are on this host.
        args: For the function, the same on every rank; they are pickled.
        timeout: All are killed after as many seconds.
        env: Further environment variables.

    The test fails with the outputs of the ranks that failed, or with the places where they hang.
    """
    ended = end_ranks(function, world_size, *args, timeout=timeout, env=env)
    hanging = [rank for rank, end in enumerate(ended) if end.code is None]
    failed = [rank for rank, end in enumerate(ended) if end.code != 0]
    if failed:
        what = f"ranks {hanging} hang after {timeout} s, " if hanging else ""
        texts = [f"--- rank {rank}, exit code {ended[rank].code}\n{ended[rank].output}" for rank in failed]
        pytest.fail(f"{what}ranks {failed} of {world_size} failed\n" + "\n".join(texts), pytrace=False)
    return [end.result for end in ended]


def end_ranks(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 60,
    env: dict[str, str] | None = None,
    start: bool = True,
) -> list[Ended]:
    """Run like :func:`run_ranks`, and return how each rank ended, whatever that was.

    Args:
        function: As there, and so are the next ones.
        world_size: As there.
        args: As there.
        timeout: As there.
        env: As there.
        start: Whether ranks meet before the function is called.
    """
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        processes = [
            _context().Process(
                target=_run, args=(folder, rank, world_size, port, timeout, dict(env or {}), start, function, args)
            )
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        started = time.monotonic()  # the first start waits for what the fork server imports
        seconds = _wait_for(processes, started, timeout)
        return [_ended(Path(folder), rank, process, seconds[rank], timeout) for rank, process in enumerate(processes)]


def printed(text: str) -> str:
    """Give what a program printed without what Gloo of torch 2.10 says when a group is made."""
    return "".join(line for line in text.splitlines(keepends=True) if not line.startswith("[Gloo] Rank "))


def free_port() -> int:
    """Return a port of this host that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _context() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _wait_for(processes: list[BaseProcess], started: float, timeout: float) -> list[float | None]:
    """Return how long each ran; None for those that had to be killed."""
    seconds: list[float | None] = [None] * len(processes)
    running = set(range(len(processes)))
    while running and time.monotonic() - started < timeout:
        multiprocessing.connection.wait([processes[rank].sentinel for rank in running], timeout=0.2)
        for rank in [rank for rank in running if not processes[rank].is_alive()]:
            seconds[rank] = time.monotonic() - started
            running.remove(rank)
    for rank in running:
        processes[rank].kill()
    for process in processes:
        process.join()
    return seconds


def _ended(folder: Path, rank: int, process: BaseProcess, seconds: float | None, timeout: float) -> Ended:
    output, result = folder / f"{rank}.txt", folder / f"{rank}.pt"
    text = output.read_text(errors="replace") if output.exists() else ""
    value = torch.load(result, weights_only=False) if result.exists() else None
    code = None if seconds is None else process.exitcode
    process.close()
    return Ended(code, text, timeout if seconds is None else seconds, value)


def _run(
    folder: str,
    rank: int,
    world_size: int,
    port: int,
    timeout: float,
    env: dict[str, str],
    start: bool,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    """Be a rank: as a program of its own would be, down to its exit code."""
    output = os.open(f"{folder}/{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = open(1, "w", buffering=1, closefd=False), open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    # Where it hangs is said before it is killed.
    faulthandler.dump_traceback_later(max(timeout - 1, timeout * 0.9), file=sys.stderr)
    for name in [name for name in os.environ if name.startswith(FOREIGN)]:
        del os.environ[name]
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "TUTEL_GLOBAL_TIMEOUT_SEC": "30",
        **env,
    }  # fmt: skip
    from tutel import system

    torch.set_num_threads(1)
    torch.manual_seed(rank)
    code = 1
    try:
        if start:
            system.init_data_model_parallel(backend="gloo")
        result = function(*args)
        torch.save(result, f"{folder}/{rank}.part")
        Path(f"{folder}/{rank}.part").rename(f"{folder}/{rank}.pt")
        code = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        # What the interpreter does at the end of a program, which multiprocessing leaves out.
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
