"""What a run found, and its form as JSON."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benches.harness import Spread

_VERSION = 2


@dataclass(frozen=True)
class Point:
    """A workload's place on a curve.

    Attributes:
        axis: What changes along the curve: ``tokens``, ``experts``, ...
        x: Its value here.
        series: What stays the same: ``forward fp32``.
    """

    axis: str
    x: float
    series: str


@dataclass(frozen=True)
class PeerResult:
    """One peer's seconds a call, and ours / theirs round by round.

    ``rounds`` is less than ours where a peer takes so long that it was called once.
    """

    name: str
    seconds: Spread
    ratio: Spread
    rounds: int


@dataclass(frozen=True)
class Measured:
    """The times of one workload.

    Attributes:
        ours: Seconds on the clock.
        cpu: Least processor seconds, divided by the number of threads.
        rounds: How often each side was measured.
        other_cores: How many cores were busy with other work meanwhile.
        peers: Who did the same.
        point: Its place on a curve, if it has one.
    """

    name: str
    ours: Spread
    cpu: float
    rounds: int
    other_cores: float
    peers: list[PeerResult]
    point: Point | None = None

    @property
    def best_peer(self) -> PeerResult | None:
        """The peer to which we compare worst: the fastest, round by round."""
        return max(self.peers, key=lambda peer: peer.ratio.median, default=None)


@dataclass(frozen=True)
class Result:
    """The times of one workload beside its floors in seconds.

    Attributes:
        bound: What the floor is made of, GEMM or memory.
        flops: Floating-point operations of a call.
    """

    measured: Measured
    floor: float
    cpu_floor: float
    cpu_floor_with_fresh: float
    bound: str
    flops: float

    @property
    def ratio_to_floor(self) -> float:
        """Our least time in floors."""
        return self.measured.ours.minimum / self.floor

    @property
    def share(self) -> float:
        """The floor's share of our least time."""
        return self.floor / self.measured.ours.minimum

    @property
    def cpu_share(self) -> float:
        """The same in processor time."""
        return self.cpu_floor / self.measured.cpu

    @property
    def cpu_share_with_fresh(self) -> float:
        """The same with the first touch of fresh memory in the floor."""
        return self.cpu_floor_with_fresh / self.measured.cpu


@dataclass(frozen=True)
class Memory:
    """Peak memory of one training step in bytes, measured in a process of its own.

    Attributes:
        side: Whose step.
        allowed: Parameters, gradients, input, output and what may be saved: the floor.
        allocated: Most bytes of tensors alive at once.
        resident: Growth of the process's memory from before the layer was made to its peak.
        saved: Bytes of tensors alive between forward and backward, less what was there before.
    """

    name: str
    side: str
    allowed: int
    allocated: int
    resident: int
    saved: int


@dataclass(frozen=True)
class Profile:
    """The functions in which a workload's processor time goes: (share, library, function), largest first."""

    name: str
    functions: list[tuple[float, str, str]]


@dataclass(frozen=True)
class Run:
    """Everything that one run found: times in seconds, rates in FLOP/s and B/s by clock, subject and who or what."""

    machine: dict[str, str]
    effort: dict[str, float]
    other_cores: float
    rates: dict[str, dict[str, dict[str, float]]]
    results: list[Result]
    #: Workloads that were not timed, since their sides do not agree, and why.
    failures: dict[str, str]
    note: str = ""
    #: Peers and tools that were not there, and why.
    missing: dict[str, str] = field(default_factory=dict)
    memory: list[Memory] = field(default_factory=list)
    profiles: list[Profile] = field(default_factory=list)

    def to_json(self) -> str:
        """Return the run as JSON."""
        return json.dumps({"version": _VERSION, **asdict(self)}, indent=1) + "\n"

    @classmethod
    def read(cls, path: Path) -> "Run":
        """Read a run.

        Raises:
            ValueError: If the file is of another version.
        """
        fields = json.loads(path.read_text())
        version = fields.pop("version", None)
        if version != _VERSION:
            raise ValueError(f"{path} is of version {version}, this program reads version {_VERSION}")
        fields["results"] = [_result(result) for result in fields["results"]]
        fields["memory"] = [Memory(**one) for one in fields["memory"]]
        fields["profiles"] = [
            Profile(one["name"], [(share, library, function) for share, library, function in one["functions"]])
            for one in fields["profiles"]
        ]
        return cls(**fields)


def _result(fields: dict[str, Any]) -> Result:
    measured = fields.pop("measured")
    peers = [
        PeerResult(peer["name"], Spread(**peer["seconds"]), Spread(**peer["ratio"]), peer["rounds"])
        for peer in measured.pop("peers")
    ]
    point = measured.pop("point")
    ours = Spread(**measured.pop("ours"))
    return Result(Measured(ours=ours, peers=peers, point=Point(**point) if point else None, **measured), **fields)
