"""Timing of what several ranks do together: sides by turns, each sample as long as its slowest rank took."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import distributed

from benches.harness import Spread


@dataclass(frozen=True)
class Effort:
    """How often to measure: rounds, each of which runs every side once, for about so long."""

    rounds: int
    sample_seconds: float


FULL = Effort(rounds=30, sample_seconds=0.02)
QUICK = Effort(rounds=5, sample_seconds=0.005)


def alternate(sides: Mapping[str, Callable[[], object]], effort: Effort) -> dict[str, list[float]]:
    """Time sides A B A B ..., every other round in reverse, on all ranks at once; every rank must call this.

    Returns:
        Seconds a call, a list as long as there are rounds for each side; the same on all ranks.
    """
    names = list(sides)
    calls = []
    for name in names:
        sides[name]()
        once = _slowest([_seconds(sides[name], 1)])[0]
        calls.append(max(1, math.ceil(effort.sample_seconds / max(once, 1e-7))))
    seconds = [[0.0] * effort.rounds for _ in names]
    for turn in range(effort.rounds):
        order = range(len(names)) if turn % 2 == 0 else reversed(range(len(names)))
        for side in order:
            distributed.barrier()
            seconds[side][turn] = _seconds(sides[names[side]], calls[side])
    flat = _slowest([value for side in seconds for value in side])
    return {name: flat[side * effort.rounds : (side + 1) * effort.rounds] for side, name in enumerate(names)}


def ratio(ours: list[float], theirs: list[float]) -> Spread:
    """Return the spread of ours / theirs within each round."""
    return Spread.of([a / b for a, b in zip(ours, theirs, strict=True)])


def _seconds(run: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def _slowest(values: list[float]) -> list[float]:
    together = torch.tensor(values, dtype=torch.float64)
    distributed.all_reduce(together, distributed.ReduceOp.MAX)
    slowest: list[float] = together.tolist()
    return slowest
