"""What a run found, and its form as JSON."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benches.harness import Spread

_VERSION = 1


@dataclass(frozen=True)
class PeerResult:
    """One peer's seconds a call, and ours / theirs round by round."""

    name: str
    seconds: Spread
    ratio: Spread


@dataclass(frozen=True)
class Measured:
    """The times of one workload.

    Attributes:
        ours: Seconds on the clock.
        cpu: Least processor seconds, divided by the number of threads.
        rounds: How often each side was measured.
        other_cores: How many cores were busy with other work meanwhile.
        peers: Who did the same.
    """

    name: str
    ours: Spread
    cpu: float
    rounds: int
    other_cores: float
    peers: list[PeerResult]


@dataclass(frozen=True)
class Result:
    """The times of one workload beside its floors in seconds, and what the floor is made of (GEMM or memory)."""

    measured: Measured
    floor: float
    cpu_floor: float
    cpu_floor_with_fresh: float
    bound: str

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
        return cls(**fields)


def _result(fields: dict[str, Any]) -> Result:
    measured = fields.pop("measured")
    peers = [
        PeerResult(peer["name"], Spread(**peer["seconds"]), Spread(**peer["ratio"])) for peer in measured.pop("peers")
    ]
    return Result(Measured(ours=Spread(**measured.pop("ours")), peers=peers, **measured), **fields)
