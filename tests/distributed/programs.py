"""Starts programs as a user does, in a session of their own: none of their processes outlives the test."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

#: A folder in which ``python3`` and its modules are the tests' own.
TOOLS = Path(sys.executable).parent
TINY = ["--batch_size=2", "--num_tokens=12", "--model_dim=8", "--hidden_size=12", "--device=cpu", "--num_steps=2"]
#: What a launcher of the tests themselves may have set.
FOREIGN = ("OMPI_", "PMI", "MPI_", "SLURM_", "TORCHELASTIC_", "MASTER_", "RANK", "WORLD_", "LOCAL_", "OMP_", "GLOO_")


def need(command: str, package: str) -> None:
    """Skip the test where a command is missing; in CI, fail."""
    if shutil.which(command) is None:
        missing(f"{command} is missing: install {package}")


def missing(reason: str) -> None:
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


@contextlib.contextmanager
def started(command: Sequence[str | Path], **variables: str) -> Iterator[subprocess.Popen[str]]:
    """Start a command; kill it and all that it started at the end."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    environment |= {"PATH": f"{TOOLS}{os.pathsep}{os.environ['PATH']}", "TUTEL_GLOBAL_TIMEOUT_SEC": "60", **variables}
    process = subprocess.Popen(
        [str(part) for part in command],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def run(command: Sequence[str | Path], status: int = 0, **variables: str) -> str:
    """Run a command to its end; return what it printed, or fail with it."""
    __tracebackhide__ = True
    with started(command, **variables) as process:
        return finish(process, status)


def finish(process: subprocess.Popen[str], status: int = 0) -> str:
    __tracebackhide__ = True
    try:
        printed, errors = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        printed, errors = process.communicate()
        pytest.fail(f"{process.args} hangs:\n{printed}\n{errors}")
    assert process.returncode == status, f"{process.args} ended with {process.returncode}:\n{printed}\n{errors}"
    return printed


def losses(printed: str) -> list[float]:
    """Return what an example printed of its losses, once for all processes."""
    found = re.findall(r"^STEP-(\d+): DONE, loss = (\S+),", printed, re.MULTILINE)
    assert [int(number) for number, _ in found] == [0, 1]
    return [float(loss) for _, loss in found]
