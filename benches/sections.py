"""The parts of a report that are not times: aims, memory and profiles, each a header and rows."""

from dataclasses import dataclass

from benches.aims import AIMS, best_peer, verdicts
from benches.results import Run

_MIB = 2**20
_FUNCTIONS = 12


@dataclass(frozen=True)
class Table:
    """A table; the columns in ``left`` are aligned there, all others right."""

    header: list[str]
    rows: list[list[str]]
    left: set[int]


def aims(run: Run) -> Table:
    """Return what was aimed at and what was measured; nothing where a run has nothing to do with the aims."""
    rows = []
    seen = 0
    found = verdicts(run)
    for verdict in found if any(verdict.worst is not None for verdict in found) else []:
        check = verdict.check
        unit = "" if check.unit == "largest / least" else f" {check.unit}"
        measured = "-" if verdict.worst is None else f"{verdict.worst:.2f}{unit}"
        peer = ""
        if verdict.aim != seen:
            seen = verdict.aim
            pattern = AIMS[seen - 1].pattern
            worst = best_peer(run, pattern) if pattern else None
            peer = f"{worst[0]:.2f}" if worst else "-"
        limit = f"{check.limit:g}{unit}"
        rows.append([str(verdict.aim), check.of, limit, measured, verdict.outcome(), verdict.where, peer])
    header = ["aim", "of", "at most", "worst", "outcome", "where", "worst ratio to best peer"]
    return Table(header, rows, {1, 4, 5})


def aim_texts() -> list[str]:
    """Return the aims in words, numbered."""
    return [f"{index}. {aim.text}." for index, aim in enumerate(AIMS, 1)]


def memory(run: Run) -> Table:
    """Return the peaks of training steps."""
    rows = []
    name = ""
    for one in run.memory:
        sizes = [f"{size / _MIB:.0f}" for size in (one.allowed, one.allocated, one.resident, one.saved)]
        shares = [f"{one.allocated / one.allowed:.2f}", f"{one.resident / one.allowed:.2f}"]
        rows.append([one.name if one.name != name else "", one.side, *sizes, *shares])
        name = one.name
    header = ["workload", "side", "allowed", "tensors", "process", "held", "tensors / allowed", "process / allowed"]
    return Table(header, rows, {0, 1})


def profiles(run: Run) -> Table:
    """Return the functions in which time goes."""
    rows = []
    for one in run.profiles:
        name = one.name
        for share, library, function in one.functions[:_FUNCTIONS]:
            # Names of generic functions have pointed brackets.
            rows.append([name, f"{share:.1%}", library, f"`{function}`"])
            name = ""
    return Table(["workload", "share", "library", "function"], rows, {0, 2, 3})
