"""What a run over several ranks found, as Markdown."""

from collections.abc import Sequence

from benches.distributed.run import Found
from benches.harness import Spread
from benches.report import duration

_METHOD = """\
All ranks are processes of one machine and talk over Gloo through its loopback. Sides run by turns (A B A B, every other
round B A B A), all ranks at once, a barrier before each sample; a sample is as long as its slowest rank took. Ratios
are taken round by round. With as many busy ranks as cores, or more, exchange and computation share the processors: what
is shown here of overlap and of the model's times is the worst case, without a network card that works by itself."""


def markdown(found: Sequence[Found], machine: dict[str, str], other_cores: float, note: str, command: str) -> str:
    """Return the record."""
    facts = "\n".join(f"- {key}: {value}" for key, value in machine.items() if value)
    noise = f"Other processes kept {other_cores:.1f} of {machine['cores']} cores busy during the run."
    parts = "\n".join(_section(one) for one in found)
    return f"""# Several ranks over Gloo: {machine["cpu"]}, {machine["cores"]} cores, {machine["date"]}

{" ".join(filter(None, [noise, note]))}

## Machine and settings

{facts}

## Method

{_METHOD}

{parts}
## Again

```
{command}
```
"""


def _section(found: Found) -> str:
    links = found.links
    parts = "\n".join(f"### {title}\n\n{note}\n\n{table}\n" for title, note, table in _parts(found))
    return f"""## {found.ranks} ranks

{found.threads} threads a rank. Links as measured: {links.intra / 1e9:.2f} GB/s, {links.latency_intra * 1e6:.0f} us a
message; products at {links.rate / 1e9:.0f} GFLOP/s a rank.

{parts}"""


def _parts(found: Found) -> list[tuple[str, str, str]]:
    """Return title, explanation and table of each part."""
    return [
        (
            "Bytes sent",
            "Bytes of one training step that all ranks send to others, counted at the functions of torch.distributed. "
            "*minimum* is\nexactly the rows whose expert is on another rank: there and back, forward and backward.",
            _sent(found),
        ),
        (
            "Bare collectives",
            "Times in ms, beside the cost model, whose latency and bandwidth were measured by exchanges just before.",
            _bare(found),
        ),
        (
            "Share of the bare bandwidth",
            "*share* is the bandwidth that our exchange reaches of bare `all_to_all_single` on the same rows and "
            "splits, *with\ncounts* when it also tells ranks how many rows come, once a forward pass. Least times in "
            "ms, medians of shares.",
            _bandwidths(found),
        ),
        ("Overlap", f"A training step, forward and backward: {found.overlap.name}. Times in ms.", _overlap(found)),
        (
            "Switches of modes",
            "Four training steps, two in each of two modes: one mode after the other, or by turns. Medians in ms.",
            _switching(found),
        ),
        (
            "Modes, and what the model says",
            "A training step in each mode, medians in ms. *exchange* is what it takes longer than a step of as many "
            "rows where\nnothing is exchanged (*alone*); *model* is the cost model with the links as measured, and *x* "
            "its choice. *loss* is the\ntime in the chosen mode over the time in the fastest.",
            _modes(found),
        ),
    ]


def _sent(found: Found) -> str:
    return _table(
        ["exchange", "rows", "minimum", "rows / minimum", "counts and settings"],
        [
            [one.name, str(one.rows), str(one.minimum), f"{one.rows / one.minimum:.3f}", str(one.numbers)]
            for one in found.sent
        ],
    )


def _bare(found: Found) -> str:
    return _table(
        ["collective", "bytes sent", "least", "median", "model", "model / least"],
        [
            [
                one.name,
                str(one.sent),
                duration(one.seconds.minimum),
                duration(one.seconds.median),
                duration(one.model),
                f"{one.model / one.seconds.minimum:.2f}",
            ]
            for one in found.bare
        ],
    )


def _bandwidths(found: Found) -> str:
    rows = []
    for one in found.exchange:
        bare, ours, counted = (duration(seconds.minimum) for seconds in one.seconds.values())
        _, share, share_counted = (f"{1 / ratio.median:.0%}" for ratio in one.ratios.values())
        rows.append([one.name, f"{one.sent / 1e6:.2f}", bare, ours, share, counted, share_counted])
    return _table(["rows", "MB sent", "bare", "ours", "share", "with counts", "share with counts"], rows)


def _overlap(found: Found) -> str:
    sides = found.overlap
    return _table(
        ["chunks", "least", "median", "time against d = 1", "q1-q3"],
        [
            [side, duration(seconds.minimum), duration(seconds.median), *_ratio(sides.ratios[side])]
            for side, seconds in sides.seconds.items()
        ],
    )


def _switching(found: Found) -> str:
    return _table(
        ["layer", "one after the other", "by turns", "by turns / one after the other", "q1-q3"],
        [
            [one.name, *(duration(each.median) for each in one.seconds.values()), *_ratio(one.ratios["by turns"])]
            for one in found.switching
        ],
    )


def _modes(found: Found) -> str:
    rows = []
    for layer in found.modes:
        # What is the layer's own stands once.
        named = [layer.name, duration(layer.alone.median)]
        for mode in layer.modes:
            chosen = mode.degree == layer.chosen
            times = [mode.exchange, mode.modelled, mode.modelled_exchange]
            rows.append(
                [
                    *named,
                    str(mode.degree),
                    duration(mode.step.median),
                    f"{duration(mode.step.lower)}-{duration(mode.step.upper)}",
                    *(duration(max(seconds, 0.0)) for seconds in times),
                    *(["x", f"{layer.loss:.2f}"] if chosen else ["", ""]),
                ]
            )
            named = ["", ""]
    header = ["layer", "alone", "r", "step", "q1-q3", "exchange", "model: step", "model: exchange", "", "loss"]
    return _table(header, rows)


def _ratio(spread: Spread) -> list[str]:
    return [f"{spread.median:.3f}", f"{spread.lower:.2f}-{spread.upper:.2f}"]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
