"""Curves as pictures: throughput and share of the floor along each axis, one file an axis and kind."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from benches.results import Result, Run

#: Name, color and marker of a side; colours that the colour-blind tell apart.
_STYLES = {
    "tutel": ("#0072B2", "o"),
    "loop over nn experts": ("#E69F00", "s"),
    "sort + torch grouped_mm": ("#009E73", "^"),
    "loop of torch.mm": ("#E69F00", "s"),
    "torch grouped_mm": ("#009E73", "^"),
}
_OTHERS = [("#CC79A7", "v"), ("#56B4E9", "D"), ("#D55E00", "P")]

_AXES = {
    "tokens": "tokens T",
    "experts": "experts E",
    "top_k": "choices a token, K",
    "hidden": "hidden units of an expert, H",
    "rows_per_expert": "rows an expert",
    "threads": "threads",
}


def _curves(results: list[Result]) -> dict[str, list[tuple[float, float, float]]]:
    """Return (x, FLOP/s, share of the floor) by side, in the order of x."""
    curves: dict[str, list[tuple[float, float, float]]] = {}
    for result in results:
        one = result.measured
        assert one.point is not None
        for name, seconds in (("tutel", one.ours), *((peer.name, peer.seconds) for peer in one.peers)):
            least = seconds.minimum
            curves.setdefault(name, []).append((one.point.x, result.flops / least, result.floor / least))
    return {name: sorted(points) for name, points in curves.items()}


def _style(name: str, seen: dict[str, tuple[str, str]]) -> tuple[str, str]:
    if name not in seen:
        seen[name] = _STYLES.get(name) or _OTHERS[(len(seen) - 1) % len(_OTHERS)]
    return seen[name]


def _finish(axes: Axes, values: list[float], label: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(values, [f"{value:g}" for value in values])
    axes.xaxis.minorticks_off()
    axes.set_xlabel(label)
    axes.grid(alpha=0.3)


def _scale(axes: Axes) -> None:
    """Let rates start at 0, or make them logarithmic where the low ones would lie on the axis."""
    rates: list[Any] = [rate for line in axes.get_lines() for rate in list(line.get_ydata())]  # type: ignore[arg-type]
    if max(rates) < 20 * min(rates):
        axes.set_ylim(0, 1.08 * max(rates))
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _draw_column(columns: Any, results: list[Result], series: str, label: str) -> None:
    top, bottom = columns
    seen: dict[str, tuple[str, str]] = {}
    values: set[float] = set()
    for name, points in _curves(results).items():
        color, marker = _style(name, seen)
        x, rate, share = zip(*points, strict=True)
        values |= set(x)
        # Ours above the others where they meet.
        style: dict[str, Any] = {"color": color, "marker": marker, "zorder": 3 if name == "tutel" else 2, "label": name}
        top.plot(x, [each / 1e9 for each in rate], **style)
        bottom.plot(x, [each * 100 for each in share], **style)
    top.set_title(series)
    top.set_ylabel("GFLOP/s")
    _scale(top)
    bottom.set_ylabel("share of the floor, %")
    bottom.axhline(100, color="#666666", linewidth=1, linestyle="--")
    bottom.set_ylim(0, None)
    for axes in (top, bottom):
        _finish(axes, sorted(values), label)


def _draw_axis(results: list[Result], axis: str, kind: str, path: Path) -> None:
    """Draw one picture: a column a dtype."""
    series = sorted({one.measured.point.series for one in results if one.measured.point}, reverse=True)
    figure = Figure(figsize=(1 + 4.5 * len(series), 7), layout="constrained")
    grid = figure.subplots(2, len(series), squeeze=False)
    for column, name in enumerate(series):
        chosen = [one for one in results if one.measured.point and one.measured.point.series == name]
        _draw_column(grid[:, column], chosen, name, _AXES.get(axis, axis))
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(f"{kind}, along {_AXES.get(axis, axis)}")
    figure.savefig(path, dpi=110)


def draw(run: Run, folder: Path) -> list[Path]:
    """Draw all curves of a run into a folder; return the files."""
    mpl.rcParams["font.size"] = 10
    pictures: dict[tuple[str, str], list[Result]] = {}
    for result in run.results:
        point = result.measured.point
        if point is not None:
            pictures.setdefault((point.axis, point.series.split()[0]), []).append(result)
    paths = []
    for (axis, kind), results in pictures.items():
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{axis}-{kind}.png"
        _draw_axis(results, axis, kind, path)
        paths.append(path)
    return paths
