"""Workers as the run sees them."""

import json
import subprocess
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benches.harness import Sample
from benches.outside.protocol import Job

_ROOT = Path(__file__).parent.parent.parent


class WorkerError(Exception):
    """A worker cannot do what it was asked for."""

    def __init__(self, worker: "Worker", reason: str) -> None:
        super().__init__(f"{worker.name}: {reason}")
        self.worker, self.reason = worker, reason


@dataclass
class Worker:
    """A process of its own that computes one block at a time."""

    name: str
    python: Path
    module: str
    _process: "subprocess.Popen[str] | None" = field(default=None, repr=False)

    def start(self) -> None:
        """Start the process.

        Raises:
            WorkerError: If there is no such interpreter.
        """
        try:
            self._process = subprocess.Popen(
                [str(self.python), "-m", self.module],
                cwd=_ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        except OSError as error:
            raise WorkerError(self, f"{self.python}: {error.strerror}") from error

    def stop(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def prepare(self, job: Job) -> None:
        """Make the block ready, in a process that has computed nothing else."""
        self.stop()
        self.start()
        self._ask({"job": asdict(job)})

    def sample(self, calls: int, inputs: int) -> Sample:
        """Time calls on inputs in turn, the mean of one."""
        return Sample(**self._ask({"calls": calls, "inputs": inputs}))

    def output(self, job: Job) -> Tensor:
        """Return the output for the first input, in fp32."""
        path = job.path(f"output of {self.name}")
        self._ask({"output": str(path)})
        return torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.float32).view(job.tokens, job.width)

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        try:
            print(json.dumps(request), file=process.stdin, flush=True)
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            _, errors = process.communicate()
            self._process = None
            raise WorkerError(self, f"ended with status {process.returncode}: {_last_line(errors)}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(self, answer["error"])
        return answer


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"
