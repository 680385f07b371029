"""A workload: one job, done by tutel and by its peers, with the work that nobody can avoid."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benches.floors import Work
from benches.harness import Sample
from benches.results import Point

Results = Sequence[Tensor]

SHORT_NAMES = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16"}

#: Norm of the difference between two sides, as a share of the norm of the result. Each side rounds several times on
#: its way, and rounding moves values across the corner of a ReLU: one of four million in fp32, which changes a
#: gradient's norm by its root. This tells a wrong result from a right one; how exact they are is the tests' business.
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-3, torch.bfloat16: 4e-2, torch.float16: 5e-3}


@dataclass(frozen=True)
class Side:
    """One way to do the job.

    Attributes:
        name: Who does it.
        run: What is timed; it returns its results.
        probe: What is compared with the other sides before that, where it is not ``run``.
    """

    name: str
    run: Callable[[], Results]
    probe: Callable[[], Results] | None = None

    def results(self) -> Results:
        """Return what the other sides must agree with."""
        return (self.probe or self.run)()


@dataclass(frozen=True)
class Case:
    """A workload that is ready to run; its sides take ``turns`` inputs in turn, and the work is their mean."""

    ours: Side
    peers: Sequence[Side]
    work: Work
    turns: int = 1


@dataclass(frozen=True)
class Workload:
    """A workload that can be made ready. Its name reads from subject to detail: ``gemm.few_large.bf16``.

    Attributes:
        dtype: What it multiplies in.
        build: Makes it ready.
        brief: Measured for a shorter time: one of the many points of a curve, or one of many shapes.
        threads: With how many threads it runs, where that is not the run's own number.
        point: Its place on a curve.
    """

    name: str
    dtype: torch.dtype
    build: Callable[[], Case]
    brief: bool = False
    threads: int | None = None
    point: Point | None = None

    @property
    def subject(self) -> str:
        """The name's first part."""
        return self.name.split(".")[0]


class DisagreementError(Exception):
    """Two sides of a workload do not compute the same: their times mean nothing."""


class MissingPeerError(Exception):
    """A peer without which a workload has no sense cannot be had here."""

    def __init__(self, peer: str, reason: str) -> None:
        super().__init__(f"{peer}: {reason}")
        self.peer, self.reason = peer, reason


def check_agreement(case: Case) -> dict[str, Sample]:
    """Run every side once and compare; return what each peer's call took.

    Raises:
        DisagreementError: If a peer's results differ from ours by more than rounding.
    """
    ours = case.ours.results()
    taken = {}
    for peer in case.peers:
        found: list[Results] = []
        taken[peer.name] = Sample.take(lambda peer=peer, found=found: found.append(peer.results()))  # type: ignore[misc]
        [theirs] = found
        if len(ours) != len(theirs):
            raise DisagreementError(f"{peer.name} returns {len(theirs)} results, we return {len(ours)}")
        for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            reason = difference(a, b)
            if reason is not None:
                raise DisagreementError(f"result {index} differs from that of {peer.name}: {reason}")
    return taken


def difference(ours: Tensor, theirs: Tensor) -> str | None:
    """Tell by how much two results differ; None where it is rounding."""
    if ours.shape != theirs.shape:
        return f"shapes {list(ours.shape)} and {list(theirs.shape)}"
    if not ours.is_floating_point():
        unequal = int((ours != theirs).sum())
        return f"{unequal} of {ours.numel()} integers" if unequal else None
    if ours.numel() == 0:
        return None
    distance = float(torch.linalg.vector_norm(ours.double() - theirs.double()))
    size = float(torch.linalg.vector_norm(theirs.double()))
    # A NaN in either must not pass.
    return None if distance <= _TOLERANCE[theirs.dtype] * size else f"by {distance:.3g} of a norm of {size:.3g}"
