"""Timing of several ways to do one thing: alternating, in one process, compared round by round."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """What repeated measurements gave.

    The minimum tells what the code costs when nothing disturbs it, the quartiles how much was disturbed.
    """

    minimum: float
    lower: float
    median: float
    upper: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Summarise at least one value."""
        # One value stands for its own quartiles.
        several = values if len(values) > 1 else [*values, *values]
        lower, median, upper = statistics.quantiles(several, n=4, method="inclusive")
        return cls(min(values), lower, median, upper)


@dataclass(frozen=True)
class Effort:
    """How long to measure one workload: rounds go on until both the time and the least number of rounds are spent.

    A round runs every side once. Three times the time ends it in any case, for a peer that takes minutes a call.
    ``sample_seconds`` is what a sample of the fastest side should take: shorter calls are repeated in it.
    """

    seconds: float
    least_rounds: int
    most_rounds: int
    sample_seconds: float = 2e-3


FULL = Effort(seconds=2.5, least_rounds=5, most_rounds=300)
#: For a point of a curve, or one of many shapes.
BRIEF = Effort(seconds=0.5, least_rounds=3, most_rounds=50)
QUICK = Effort(seconds=0.3, least_rounds=2, most_rounds=20)

#: Calls are not repeated beyond this: it is long enough to be timed well.
_LONGEST_SAMPLE = 0.05


@dataclass(frozen=True)
class Sample:
    """Seconds of one call on the clock, and on all processors together."""

    wall: float
    cpu: float

    @classmethod
    def take(cls, run: Callable[[], object], calls: int = 1) -> "Sample":
        """Take the mean of some calls. Results are dropped within the time, as a program's are."""
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(calls):
            run()
        return cls((time.perf_counter() - wall) / calls, (time.process_time() - cpu) / calls)


def alternate(sides: Sequence[Callable[[], object]], effort: Effort, turns: int = 1) -> list[list[Sample]]:
    """Time the sides A B A B ...: one list a side, of one length.

    A side that takes several inputs in turn gets all of its ``turns`` in each sample, so that samples compare. The
    order within a round is reversed every other round: neither side always runs on the caches that the other left.
    """
    for run in sides:
        run()
    once = [Sample.take(run, turns).wall for run in sides]
    wanted = min(effort.sample_seconds / min(once), _LONGEST_SAMPLE / max(once))
    calls = turns * max(1, math.ceil(wanted / turns))
    return take_turns([lambda run=run: Sample.take(run, calls) for run in sides], effort)  # type: ignore[misc]


def take_turns(samplers: Sequence[Callable[[], Sample]], effort: Effort) -> list[list[Sample]]:
    """Take samples in rounds until the effort is spent: one list a sampler, of one length."""
    samples: list[list[Sample]] = [[] for _ in samplers]
    start = time.perf_counter()
    for done in range(effort.most_rounds):
        spent = time.perf_counter() - start
        if (done >= effort.least_rounds and spent > effort.seconds) or (done > 0 and spent > 3 * effort.seconds):
            break
        order = range(len(samplers)) if done % 2 == 0 else reversed(range(len(samplers)))
        for side in order:
            samples[side].append(samplers[side]())
    return samples


def pairwise_ratio(ours: Sequence[Sample], peer: Sequence[Sample]) -> Spread:
    """Spread of ours / peer within each round: what slows a whole round down cancels out.

    A peer that was called once is compared with each of our rounds.
    """
    paired = peer if len(peer) == len(ours) else [peer[0]] * len(ours)
    return Spread.of([a.wall / b.wall for a, b in zip(ours, paired, strict=True)])
