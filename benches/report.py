"""A run as text for the terminal and as Markdown for the record."""

from collections.abc import Sequence
from pathlib import Path

from benches import sections
from benches.harness import Spread
from benches.results import Run
from benches.sections import Table

_OURS = ["workload", "ours min", "med", "q1-q3", "cpu", "% wall", "% cpu", "% +fresh", "others", "rounds"]
_HEADER = [*_OURS, "peer", "min", "med", "ratio", "q1-q3"]
_LEFT = {0, len(_OURS)}
#: Cores of other work from which a record says that it was disturbed.
_DISTURBED = 0.1

_ONE_PROCESS = "All sides run in one process, warmed"
_METHOD = """\
{setting}, by turns (A B A B, every other round B A B A); results are compared before they are timed.

*ratio* is ours / peer by the clock, paired round by round, its median and quartiles: below 1 we are faster. *% wall* is
the share of our least time that the machine needs for the work's FLOPs at its best matrix product (G) or for its bytes
at its warm bandwidth (M), whichever is more. *cpu* is our least processor time divided by the number of threads,
*% cpu* the same share in processor time. On a busy machine it tells more, but it takes two things for granted: that all
threads work all the time, which a serial kernel does not, and that memory is as fast for all threads at once as for the
few that ran together. *% +fresh* is *% cpu* with the first touch of fresh memory in the floor, done the cheapest way
measured. Floors are the best rates seen in the same run. *others* is how many cores other processes used meanwhile.
Subjects of many workloads (skew, shape, curve, deepspeed) are measured more briefly than the others.

A share above 100 % is marked *!* and is no achievement: its floor was measured while others ran, or the data stayed in
the cache and never met the memory. A peer that is marked *once* took longer for one call than the whole workload may:
it was called once, and its ratio pairs that call with each of our rounds."""


_MEMORY = """\
Each step (forward, and backward with ones) runs in a process of its own, after one with 16 tokens. Sizes in MiB.
*allowed* is parameters, input and output, the gradient of each, and what may be saved between: of a layer [R, H] and
[R, D], of routing the plan. *tensors* is the most that torch had allocated at once, *process* the growth of resident
memory, both with parameters and input; *held* is what is alive between forward and backward beside them (the output
too)."""

_PROFILES = "Shares of the processor time while the workload repeats, sampled by perf's cpu-clock; our own side only."


def duration(seconds: float) -> str:
    """Return a time in ms with three digits."""
    ms = seconds * 1e3
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.1f}" if ms >= 10 else f"{ms:.2f}" if ms >= 1 else f"{ms:.3f}"


def _quartiles(spread: Spread) -> str:
    return f"{duration(spread.lower)}-{duration(spread.upper)}"


def _share(share: float) -> str:
    # More than everything: the floor was measured while others ran, or the data stayed in the cache.
    return f"{share:.0%}" + ("!" if share > 1 else "")


def _rows(run: Run) -> list[list[str]]:
    rows = []
    for result in run.results:
        one = result.measured
        ours = [one.name, duration(one.ours.minimum), duration(one.ours.median), _quartiles(one.ours)]
        ours += [duration(one.cpu), f"{_share(result.share)} {result.bound[0].upper()}", _share(result.cpu_share)]
        ours += [_share(result.cpu_share_with_fresh), f"{one.other_cores:.1f}", str(one.rounds)]
        for peer in one.peers:
            ratio = [f"{peer.ratio.median:.2f}", f"{peer.ratio.lower:.2f}-{peer.ratio.upper:.2f}"]
            name = f"{peer.name} (once)" if peer.rounds < one.rounds else peer.name
            rows.append([*ours, name, duration(peer.seconds.minimum), duration(peer.seconds.median), *ratio])
            # Further peers stand below with our columns left blank.
            ours = [""] * len(ours)
        if not one.peers:
            rows.append([*ours, *[""] * (len(_HEADER) - len(ours))])
    return rows


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]], left: set[int]) -> str:
    """Return a table of plain text; columns in ``left`` are aligned there, all others right."""
    table = [list(header), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in table
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in lines)


def _pipes(header: Sequence[str], rows: Sequence[Sequence[str]], left: set[int]) -> str:
    rule = [":--" if i in left else "--:" for i in range(len(header))]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *rows])


def _floors(run: Run) -> list[str]:
    lines = []
    for clock, subjects in run.rates.items():
        for subject, rates in subjects.items():
            unit = "GB/s" if subject == "memory" else "GFLOP/s"
            each = ", ".join(f"{name} {rate / 1e9:.4g}" for name, rate in rates.items())
            lines.append(f"by {clock} time, {subject}: {each} {unit}")
    return lines


def _failures(run: Run) -> list[str]:
    lines = [f"\nNot timed: {name}: {reason}" for name, reason in run.failures.items()]
    return [*lines, *(f"\nMissing: {name}: {reason}" for name, reason in run.missing.items())]


def _plain(title: str, table: Table) -> list[str]:
    return ["", title, "", aligned(table.header, table.rows, table.left)] if table.rows else []


def _section(title: str, before: str, table: Table) -> str:
    if not table.rows:
        return ""
    return f"## {title}\n\n{before}\n\n{_pipes(table.header, table.rows, table.left)}\n\n"


def _effort(run: Run) -> str:
    effort = run.effort
    return (
        f"at least {effort['least_rounds']:.0f} rounds and up to {effort['most_rounds']:.0f} in "
        f"{effort['seconds']:.0f} s a workload; a sample takes at least {effort['sample_seconds'] * 1e3:.0f} ms"
    )


def text(run: Run) -> str:
    """Return the report for the terminal."""
    lines = [f"{name}: {value}" for name, value in run.machine.items()]
    lines += [*_floors(run), f"others: {run.other_cores:.1f} cores busy with other work", ""]
    if run.results:
        lines += ["times in ms; ratio = ours / peer", "", aligned(_HEADER, _rows(run), _LEFT)]
    lines += _failures(run)
    lines += _plain("peak memory of a training step, MiB", sections.memory(run))
    lines += _plain("where processor time goes", sections.profiles(run))
    lines += _plain("aims", sections.aims(run))
    return "\n".join(lines)


def markdown(
    run: Run, name: str, pictures: Sequence[Path] = (), command: str = "python -m benches", setting: str = _ONE_PROCESS
) -> str:
    """Return the record; ``pictures`` are beside it, ``command`` makes another; ``setting`` is how sides run."""
    tables = [_pipes(_HEADER, _rows(run), _LEFT)] if run.results else []
    results = "\n".join([*tables, *_failures(run)])
    machine = "\n".join(f"- {key}: {value}" for key, value in run.machine.items() if value)
    floors = "\n".join(f"- {line}" for line in _floors(run))
    noise = f"Other processes kept {run.other_cores:.1f} of {run.machine['cores']} cores busy during the run."
    if run.other_cores > _DISTURBED:
        noise += " Absolute times and shares of the floor are worse than on an idle machine."
    aims = _section("Aims", "\n".join(sections.aim_texts()), sections.aims(run))
    memory = _section("Peak memory of a training step", _MEMORY, sections.memory(run))
    profiles = _section("Where processor time goes", _PROFILES, sections.profiles(run))
    curves = "\n\n".join(f"![{path.stem}]({path.parent.name}/{path.name})" for path in pictures)
    curves = f"## Curves\n\n{curves}\n\n" if curves else ""
    return f"""# {run.machine["cpu"]}, {run.machine["cores"]} cores, {run.machine["date"]}

{" ".join(filter(None, [noise, run.note]))}

{aims}## Machine and settings

{machine}
- effort: {_effort(run)}

## Floors, measured in this run

{floors}

## Method

{_METHOD.format(setting=setting)}

## Results

Times in ms.

{results}

{curves}{memory}{profiles}## Again

```
{command} --record {name}
{command} --filter REGEX --quick      # a look at some
```
"""
