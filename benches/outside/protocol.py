"""How the run talks to a worker: a JSON object a line on its standard input, and one a line for an answer.

While another works, a worker sleeps in its next read. Tensors travel as files of raw numbers. This file needs the
standard library alone, since workers run in environments that have little else.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any


@dataclass(frozen=True)
class Job:
    """One block and its inputs, in a folder of files of float32 numbers that are exact in ``dtype``.

    ``router`` [E, D], ``gate`` and ``up`` [E, H, D], ``down`` [E, D, H], and ``inputs`` [N, T, D], N inputs in turn.
    """

    folder: str
    dtype: str
    experts: int
    hidden: int
    width: int
    top_k: int
    tokens: int
    inputs: int
    threads: int

    def path(self, name: str) -> Path:
        """Return the path of a file."""
        return Path(self.folder) / f"{name}.f32"


#: Computes input i and keeps the output; the other gives the output of the last call as float32 bytes.
Block = tuple[Callable[[int], object], Callable[[], bytes]]


def serve(prepare: Callable[[Job], Block]) -> None:
    """Answer until the input ends; an error is an answer too."""
    answers = _own_output()
    block: Block | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if "job" in request:
                block = None
                block = prepare(Job(**request["job"]))
                answer: dict[str, Any] = {}
            else:
                assert block is not None
                answer = _answer(block, request)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


def _own_output() -> IO[str]:
    """Return the standard output, and send what libraries print to the error output from now on."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def _answer(block: Block, request: dict[str, Any]) -> dict[str, Any]:
    run, output = block
    if "output" in request:
        run(0)
        Path(request["output"]).write_bytes(output())
        return {}
    calls, inputs = request["calls"], request["inputs"]
    wall, cpu = time.perf_counter(), time.process_time()
    for call in range(calls):
        run(call % inputs)
    return {"wall": (time.perf_counter() - wall) / calls, "cpu": (time.process_time() - cpu) / calls}
