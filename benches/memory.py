"""Peak memory of a training step, each in a process of its own: ``python -m benches.memory WORKLOAD SIDE``."""

import ctypes
import gc
import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd import profiler
from tutel.functional import RowAssignment, assign_rows, select_experts

from benches.results import Memory
from benches.workload import SHORT_NAMES
from benches.workloads import hugging_face
from benches.workloads.layer import HELLOWORLD, Sizes
from benches.workloads.layer_peers import GroupedLayer

_ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class _Step:
    """A training step: its sides make a layer and its input.

    Attributes:
        output: Bytes of the output.
        saved: Bytes that may be saved for the backward pass: a layer's [R, H] and [R, D].
    """

    name: str
    sides: Mapping[str, Callable[[], tuple[nn.Module, Tensor]]]
    output: int
    saved: int


class _Routing(nn.Module):
    """Logits [T, E] to the weights [T, K] of a plan that is kept."""

    def __init__(self, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.rows: RowAssignment | None = None

    def forward(self, logits: Tensor) -> Tensor:
        chosen = select_experts(logits, self.top_k)
        self.rows = assign_rows(chosen.ids, logits.shape[1])
        return chosen.weights


def _routing(tokens: int, experts: int, top_k: int) -> _Step:
    def make() -> tuple[nn.Module, Tensor]:
        return _Routing(top_k), torch.randn(tokens, experts)

    # ids, slots and both row maps beside the weights.
    saved = tokens * top_k * (4 + 4 + 8 + 8)
    return _Step(f"route.train.E{experts}_k{top_k}_T{tokens}", {"tutel": make}, tokens * top_k * 4, saved)


def _helloworld(sizes: Sizes) -> _Step:
    def make(side: str) -> tuple[nn.Module, Tensor]:
        layer = sizes.ours()
        return layer if side == "tutel" else GroupedLayer(layer, sizes.top_k), sizes.inputs(1)[0]

    saved = sizes.rows * (sizes.hidden + sizes.width) * sizes.dtype.itemsize
    names = ["tutel", "sort + torch grouped_mm"]
    sides = {name: partial(make, name) for name in names}
    return _Step(f"layer.train.{sizes}", sides, sizes.inputs(1)[0].nbytes, saved)


def _hugging_face(block: hugging_face.Block, tokens: int, dtype: torch.dtype) -> _Step:
    def make(side: str) -> tuple[nn.Module, Tensor]:
        theirs = block.theirs(dtype)
        [given] = block.inputs(theirs, tokens, 1)
        if side == "tutel":
            return block.ours(theirs), given
        return hugging_face.with_implementation(theirs, side.removeprefix("transformers ")), given

    saved = tokens * block.top_k * (block.hidden + hugging_face.WIDTH) * dtype.itemsize
    names = ["tutel", "transformers grouped_mm"]
    name = f"hf.train.{SHORT_NAMES[dtype]}.{block.name}_T{tokens}"
    sides = {side: partial(make, side) for side in names}
    return _Step(name, sides, tokens * hugging_face.WIDTH * dtype.itemsize, saved)


def _steps() -> list[_Step]:
    steps = [_routing(8192, 256, 8)]
    steps += [_helloworld(sizes) for sizes in HELLOWORLD if sizes.dtype != torch.float64]
    if hugging_face.WORKLOADS:
        pairs = [(block, dtype) for block in hugging_face.BLOCKS for dtype in (torch.float32, torch.bfloat16)]
        steps += [_hugging_face(block, 2048, dtype) for block, dtype in pairs]
    return steps


def _status(field: str) -> int:
    """Return a size of this process in bytes; 0 where the system does not tell."""
    path = Path("/proc/self/status")
    found = re.search(rf"^{field}:\s+(\d+) kB", path.read_text(), re.MULTILINE) if path.exists() else None
    return int(found[1]) * 1024 if found else 0


def _forget_peak() -> None:
    path = Path("/proc/self/clear_refs")
    if path.exists():
        path.write_text("5")


def _bytes(tensors: list[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _train(layer: nn.Module, given: Tensor, between: Callable[[], None] = lambda: None) -> None:
    tokens = given.detach().requires_grad_()
    output = layer(tokens)
    between()
    output.backward(torch.ones_like(output))


def _forget_grads(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        parameter.grad = None
    gc.collect()
    # What was freed and stays with the process would be taken up again unseen.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def traced_peak(step: Callable[[Callable[[], None]], None]) -> tuple[int, int]:
    """Return the most bytes of tensors that a step had alive at once, and how many at its mark.

    The step is called with a function that sets the mark. What was alive before does not count.
    """

    def mark() -> None:
        with profiler.record_function("benches mark"):
            pass

    with profiler.profile(profile_memory=True) as profile:
        step(mark)
    events = sorted(profile.kineto_results.events(), key=lambda event: event.start_ns())
    alive = peak = marked = 0
    for event in events:
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
        elif event.name() == "benches mark":
            marked = alive
    return peak, marked


def measure(name: str, side: str) -> Memory:
    """Measure one step in this process."""
    step = next(step for step in _steps() if step.name == name)
    layer, given = step.sides[side]()
    parameters = _bytes(list(layer.parameters()))
    there = parameters + given.nbytes
    # With a few tokens first: libraries make their threads and buffers.
    _train(layer, given[..., :16, :])
    _forget_grads(layer)
    before = _status("VmRSS")
    _forget_peak()
    _train(layer, given)
    resident = _status("VmHWM") - before + there
    _forget_grads(layer)
    allocated, saved = traced_peak(lambda mark: _train(layer, given, mark))
    allowed = 2 * (parameters + given.nbytes + step.output) + step.saved
    return Memory(name, side, allowed, there + allocated, resident, saved)


def measure_all(pattern: str, missing: dict[str, str]) -> list[Memory]:
    """Measure the steps whose names match, each side in a process of its own; say in ``missing`` what failed."""
    found = []
    for step in _steps():
        if not re.search(pattern, step.name):
            continue
        for side in step.sides:
            print(f"memory of {step.name}, {side} ...", file=sys.stderr, flush=True)
            command = [sys.executable, "-m", "benches.memory", step.name, side]
            child = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True)
            if child.returncode:
                missing[f"memory of {step.name}, {side}"] = (child.stderr.splitlines() or ["it said nothing"])[-1]
                continue
            found.append(Memory(**json.loads(child.stdout.splitlines()[-1])))
    return found


if __name__ == "__main__":
    print(json.dumps(asdict(measure(*sys.argv[1:]))))
