"""Two runs side by side."""

from pathlib import Path

from benches.harness import Spread
from benches.report import aligned, duration
from benches.results import Result, Run

#: What moves by less is no change, however steady the machine.
_LEAST = 0.03


def verdict(before: Spread, after: Spread) -> str:
    """Tell whether something changed by more than the noise: ``faster``, ``slower`` or nothing.

    It did where the middle halves of the measurements lie apart, and their medians by a few percent.
    """
    if after.upper < before.lower and after.median < before.median * (1 - _LEAST):
        return "faster"
    if after.lower > before.upper and after.median > before.median * (1 + _LEAST):
        return "slower"
    return ""


def compare_files(before: Path, after: Path) -> str:
    """Return a table of what changed from one run to the other."""
    return compare(Run.read(before), Run.read(after), str(before), str(after))


def compare(a: Run, b: Run, a_name: str, b_name: str) -> str:
    """Return a table of what changed from one run to the other, and a list of what changed by more than the noise.

    Times of two runs compare only where the machine was in the same state. The ratios to a peer and the shares of the
    floor, each measured within its run, compare more safely: it is the ratios that decide, and times where there is no
    common peer.
    """
    old = {result.measured.name: result for result in a.results}
    rows, changes = [], []
    for new in b.results:
        was = old.pop(new.measured.name, None)
        if was is not None:
            made, changed = _rows(was, new)
            rows += made
            changes += changed
    header = ["workload", "A ms", "B ms", "B / A", "A % cpu", "B % cpu", "peer", "A ratio", "B ratio", "changed"]
    lines = [f"A: {a_name}: {_origin(a)}", f"B: {b_name}: {_origin(b)}", "", aligned(header, rows, {0, 6, 9})]
    known = {result.measured.name for result in a.results}
    lines += [f"only in A: {name}" for name in old]
    lines += [f"only in B: {result.measured.name}" for result in b.results if result.measured.name not in known]
    lines += ["", "changed by more than the noise, from A to B:", *(changes or ["nothing"])]
    return "\n".join(lines)


def _rows(was: Result, new: Result) -> tuple[list[list[str]], list[str]]:
    """Return the table's rows of one workload, and its lines for the list of changes."""
    name = new.measured.name
    cells = [
        name,
        duration(was.measured.ours.minimum),
        duration(new.measured.ours.minimum),
        f"{new.measured.ours.minimum / was.measured.ours.minimum:.2f}",
        f"{was.cpu_share:.0%}",
        f"{new.cpu_share:.0%}",
    ]
    rows, changes = [], []
    before = {peer.name: peer.ratio for peer in was.measured.peers}
    common = [peer for peer in new.measured.peers if peer.name in before]
    if not common:
        changed = verdict(was.measured.ours, new.measured.ours)
        rows.append([*cells, "", "-", "-", changed])
        if changed:
            times = f"{duration(was.measured.ours.median)} to {duration(new.measured.ours.median)} ms"
            changes.append(f"{changed}: {name}: {times}")
        return rows, changes
    for peer in common:
        changed = verdict(before[peer.name], peer.ratio)
        ratios = [f"{before[peer.name].median:.2f}", f"{peer.ratio.median:.2f}"]
        rows.append([*cells, peer.name, *ratios, changed])
        cells = [""] * len(cells)
        if changed:
            changes.append(f"{changed}: {name}: {' to '.join(ratios)} times {peer.name}")
    return rows, changes


def _origin(run: Run) -> str:
    machine = run.machine
    return f"{machine['date']}, {machine['cpu']}, tutel {machine['tutel']}, {run.other_cores:.1f} cores of other work"
