"""What this project sets out to reach on a CPU, and whether a run reached it."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benches.results import Result, Run


@dataclass(frozen=True)
class Check:
    """One number of an aim.

    Attributes:
        of: What is looked at.
        limit: What it may be at most.
        measure: Returns the worst value in a run and where it was found; None where the run has nothing of it.
        unit: How the value is written.
    """

    of: str
    limit: float
    measure: Callable[[Run], tuple[float, str] | None]
    unit: str = "x floor"


@dataclass(frozen=True)
class Aim:
    """An aim and the numbers that it consists of. ``pattern`` matches the workloads where peers compare."""

    text: str
    checks: Sequence[Check]
    pattern: str = ""


@dataclass(frozen=True)
class Verdict:
    """A check of a run: the worst value; None where nothing was measured."""

    aim: int
    check: Check
    worst: float | None
    where: str

    @property
    def met(self) -> bool | None:
        """Whether the aim was reached; None where nothing was measured."""
        return None if self.worst is None else self.worst <= self.check.limit

    def outcome(self) -> str:
        """Return ``met``, ``missed by 12 %`` or ``not measured``."""
        if self.worst is None:
            return "not measured"
        return "met" if self.met else f"missed by {self.worst / self.check.limit - 1:.0%}"


def matching(run: Run, pattern: str) -> list[Result]:
    """Return the results whose workloads' names match."""
    return [result for result in run.results if re.search(pattern, result.measured.name)]


def _worst(values: list[tuple[float, str]]) -> tuple[float, str] | None:
    return max(values, default=None)


def _floor(of: str, pattern: str, limit: float) -> Check:
    def measure(run: Run) -> tuple[float, str] | None:
        return _worst([(result.ratio_to_floor, result.measured.name) for result in matching(run, pattern)])

    return Check(of, limit, measure)


def best_peer(run: Run, pattern: str) -> tuple[float, str] | None:
    """Return our worst ratio to the best peer, and the workload with the peer's name."""
    found = []
    for result in matching(run, pattern):
        peer = result.measured.best_peer
        if peer is not None:
            found.append((peer.ratio.median, f"{result.measured.name}, {peer.name}"))
    return _worst(found)


def _peers(of: str, pattern: str) -> Check:
    return Check(of, 1.0, lambda run: best_peer(run, pattern), "x best peer")


def _milliseconds(of: str, pattern: str, limit: float) -> Check:
    def measure(run: Run) -> tuple[float, str] | None:
        return _worst([(one.measured.ours.minimum * 1e3, one.measured.name) for one in matching(run, pattern)])

    return Check(of, limit, measure, "ms")


def _memory(of: str, field: str, pattern: str) -> Check:
    def measure(run: Run) -> tuple[float, str] | None:
        ours = [one for one in run.memory if one.side == "tutel" and re.search(pattern, one.name)]
        return _worst([(getattr(one, field) / one.allowed, one.name) for one in ours])

    # Biases, losses and the plan are not in the allowance.
    return Check(of, 1.02, measure, "x allowed")


def _linear(of: str, axis: str, least: float, limit: float) -> Check:
    """Compare cost along an axis: seconds for each unit, from ``least`` units on, largest over smallest."""

    def measure(run: Run) -> tuple[float, str] | None:
        costs: dict[str, list[float]] = {}
        for result in run.results:
            point = result.measured.point
            if point is not None and point.axis == axis and point.x >= least:
                costs.setdefault(point.series, []).append(result.measured.ours.minimum / point.x)
        spreads = [(max(each) / min(each), series) for series, each in costs.items() if len(each) > 1]
        return _worst(spreads)

    return Check(of, limit, measure, "largest / least")


def _even(of: str, axis: str, limit: float) -> Check:
    """Compare ratios to the floor along an axis, largest over smallest: the floor knows which weights are touched."""

    def measure(run: Run) -> tuple[float, str] | None:
        ratios: dict[str, list[float]] = {}
        for result in run.results:
            point = result.measured.point
            if point is not None and point.axis == axis:
                ratios.setdefault(point.series, []).append(result.ratio_to_floor)
        spreads = [(max(each) / min(each), series) for series, each in ratios.items() if len(each) > 1]
        return _worst(spreads)

    return Check(of, limit, measure, "largest / least")


AIMS = [
    Aim(
        "helloworld's training step: at most 1.15 times the arithmetic floor; with 64 experts of 512 hidden units "
        "at most 1.6 times",
        [
            _floor("E2 H2048", r"^layer\.train\..*\.E2_", 1.15),
            _floor("E64 H512", r"^layer\.train\..*\.E64_", 1.6),
        ],
        r"^layer\.train\.",
    ),
    Aim(
        "Blocks of Hugging Face: prefill at most 1.2 times the floor (fp32) and 1.25 times (bf16), decoding one token "
        "1.25, eight tokens 1.5, training 1.3; never slower than the best that is built in",
        [
            _floor("prefill fp32", r"^hf\.forward\.fp32\..*_T2048", 1.2),
            _floor("prefill bf16", r"^hf\.forward\.bf16\..*_T2048", 1.25),
            _floor("decode T = 1", r"^hf\.forward\..*_T1$", 1.25),
            _floor("decode T = 8", r"^hf\.forward\..*_T8$", 1.5),
            _floor("training", r"^hf\.train\.", 1.3),
            _peers("never slower", r"^hf\."),
        ],
        r"^hf\.",
    ),
    Aim(
        "Dispatch and combine, forward and backward: at least 80 % of the bandwidth of a warm copy",
        [_floor("both", r"^(dispatch|combine)\.", 1 / 0.8)],
        r"^(dispatch|combine)\.",
    ),
    Aim(
        "Routing of 8192 tokens to 8 of 256 experts: at most 2 ms on one thread, and nothing of size [T, E] is kept",
        [
            _milliseconds("time", r"^route\.forward\.E256_k8_T8192\.threads1", 2.0),
            # An allowance without anything of that size but the logits and their gradient.
            _memory("memory", "allocated", r"^route\."),
        ],
        r"^route\.",
    ),
    Aim(
        "Peak memory of a training step: parameters, gradients, input, output and each one's gradient, and at most "
        "[R, H] and [R, D] saved",
        [_memory("tensors", "allocated", r"^(layer|hf)\."), _memory("the process", "resident", r"^(layer|hf)\.")],
    ),
    Aim(
        "No cliffs: odd sizes, skew, empty experts, one token, one expert: within 1.5 times their own floor",
        [_floor("skew", r"^skew\.", 1.5), _floor("shapes", r"^shape\.", 1.5)],
        r"^(skew|shape)\.",
    ),
    Aim(
        "Cost grows linearly with the tokens (a token's cost from 512 tokens on is the same within a quarter), and "
        "with experts only through the weights touched (the ratio to the floor is the same within a half)",
        [
            _linear("along tokens", "tokens", 512, 1.25),
            _even("along experts", "experts", 1.5),
        ],
        r"^curve\.(tokens|experts)\.",
    ),
]


def verdicts(run: Run) -> list[Verdict]:
    """Check a run against every number of every aim."""
    found = []
    for index, aim in enumerate(AIMS, 1):
        for check in aim.checks:
            worst, where = check.measure(run) or (None, "")
            found.append(Verdict(index, check, worst, where))
    return found
