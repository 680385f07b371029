"""Two runs side by side."""

from pathlib import Path

from benches.report import aligned, duration
from benches.results import Run


def compare_files(before: Path, after: Path) -> str:
    """Return a table of what changed from one run to the other.

    Times of two runs compare only where the machine was in the same state. The ratios to a peer and the shares of the
    floor, each measured within its run, compare more safely.
    """
    a, b = Run.read(before), Run.read(after)
    old = {result.measured.name: result for result in a.results}
    rows = []
    for new in b.results:
        name = new.measured.name
        if name not in old:
            continue
        was = old.pop(name)
        cells = [name, duration(was.measured.ours.minimum), duration(new.measured.ours.minimum)]
        cells += [
            f"{new.measured.ours.minimum / was.measured.ours.minimum:.2f}",
            f"{was.cpu_share:.0%}",
            f"{new.cpu_share:.0%}",
        ]
        ratios = {peer.name: peer.ratio.median for peer in was.measured.peers}
        for peer in new.measured.peers:
            before_ratio = f"{ratios[peer.name]:.2f}" if peer.name in ratios else "-"
            rows.append([*cells, peer.name, before_ratio, f"{peer.ratio.median:.2f}"])
            cells = [""] * len(cells)
    header = ["workload", "A ms", "B ms", "B / A", "A % cpu", "B % cpu", "peer", "A ratio", "B ratio"]
    lines = [f"A: {before}: {_origin(a)}", f"B: {after}: {_origin(b)}", "", aligned(header, rows, {0, 6})]
    known = {result.measured.name for result in a.results}
    lines += [f"only in A: {name}" for name in old]
    lines += [f"only in B: {result.measured.name}" for result in b.results if result.measured.name not in known]
    return "\n".join(lines)


def _origin(run: Run) -> str:
    machine = run.machine
    return f"{machine['date']}, {machine['cpu']}, tutel {machine['tutel']}, {run.other_cores:.1f} cores of other work"
