"""Plans as tables on the terminal and as pictures."""

import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tutel.commands.plan import ASSUMPTIONS, OVERLAP_DEGREES, WEAK_SCALING, Plan, Way
from tutel.commands.quantities import show_bytes, show_seconds
from tutel.distributed.cost import Cost, Links, Sizes


def show_plan(plan: Plan, links: Links, *, training: bool) -> None:
    """Print every way of one number of ranks, and which is chosen and why."""
    console = _console()
    _show_setting(console, plan.sizes, links, training=training, ranks=f"{plan.sizes.world_size} ranks")
    console.print(_modes(plan))
    console.print(_ways(plan))
    console.print(f"parallel_type='auto' chooses r = {plan.auto}: {_reason(plan)}")
    console.print(f"Fastest of all: {_name(plan.fastest)}, {show_seconds(plan.fastest.cost.seconds_total)}.")
    _show_assumptions(console, ASSUMPTIONS, [plan], links)


def show_curve(plans: list[Plan], links: Links, *, training: bool) -> None:
    """Print the fastest way for each number of ranks."""
    console = _console()
    span = f"{plans[0].sizes.world_size} to {plans[-1].sizes.world_size} ranks"
    _show_setting(console, plans[0].sizes, links, training=training, ranks=span)
    table = _table("ranks", "experts", "auto r", "fastest", "messages", "exchange", "compute", "total", "efficiency",
                   "memory")  # fmt: skip
    first = plans[0].fastest.cost.seconds_total
    for plan in plans:
        best = plan.fastest.cost
        table.add_row(
            str(plan.sizes.world_size),
            str(plan.sizes.num_experts),
            str(plan.auto),
            _name(plan.fastest),
            str(best.messages),
            show_seconds(best.seconds_exchange),
            show_seconds(best.seconds_compute),
            show_seconds(best.seconds_total),
            f"{first / best.seconds_total:.0%}" if best.seconds_total > 0 else "-",
            show_bytes(best.memory),
        )
    console.print(table)
    console.print(f"Efficiency: time of {plans[0].sizes.world_size} / time of W ranks, each with the same work.")
    _show_assumptions(console, (WEAK_SCALING, *ASSUMPTIONS), plans, links)


def draw(plans: list[Plan], path: Path, *, scale: bool) -> None:
    """Draw a curve over the number of ranks, or bars of the modes.

    Raises:
        ImportError: If matplotlib is not there.
        OSError: If the file cannot be written.
        ValueError: If the file's ending names no format.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("needs matplotlib, which is not installed (pip install matplotlib)") from None
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    if scale:
        ranks = [plan.sizes.world_size for plan in plans]
        for name in ("total", "exchange", "compute"):
            axes.plot(ranks, [getattr(plan.fastest.cost, f"seconds_{name}") for plan in plans], marker="o", label=name)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("ranks, each with the same work")
    else:
        [plan] = plans
        modes = [way.cost for way in plan.ways if way.overlap_degree == 1 and not way.hierarchical]
        places = range(len(modes))
        compute = [mode.seconds_compute for mode in modes]
        axes.bar(places, compute, label="compute")
        axes.bar(places, [mode.seconds_exchange for mode in modes], bottom=compute, label="exchange")
        axes.set_xticks(places, [f"r = {mode.degree}" for mode in modes])
    axes.set_ylabel("seconds a step")
    axes.legend()
    figure.savefig(path)


def _console() -> Console:
    # A pipe or a file has no width: tables must not be cut to what a terminal would have by default.
    return Console(highlight=False, width=None if sys.stdout.isatty() else 140)


def _table(*columns: str) -> Table:
    table = Table()
    for column in columns:
        table.add_column(column, justify="left" if column in ("fastest", "exchange by") else "right")
    return table


def _show_setting(console: Console, sizes: Sizes, links: Links, *, training: bool, ranks: str) -> None:
    held = f"{sizes.local_experts} experts a rank" if sizes.shards == 1 else f"{sizes.shards} ranks an expert"
    console.print(
        f"{'Training step' if training else 'Forward'}, {ranks}, {held}: T = {sizes.tokens} tokens a rank, "
        f"D = {sizes.model_dim}, H = {sizes.hidden}, K = {sizes.top_k}, {sizes.matrices} matrices, "
        f"{sizes.element_size} bytes an element"
    )
    console.print(
        f"Nodes of {links.node_size} ranks; inside {show_bytes(links.intra)}/s and {show_seconds(links.latency_intra)} "
        f"a message, between {show_bytes(links.inter)}/s and {show_seconds(links.latency_inter)}; "
        f"{links.rate / 1e12:.3g} TFLOP/s"
    )


def _show_assumptions(console: Console, lines: tuple[str, ...], plans: list[Plan], links: Links) -> None:
    console.print("Assumed:")
    for line in lines:
        console.print(f"- {line}")
    ranks = [plan.sizes.world_size for plan in plans]
    if any(count > links.node_size and count % links.node_size for count in ranks):
        console.print(f"- Of ranks that do not fill nodes of {links.node_size}, each counts as a node of its own.")


def _modes(plan: Plan) -> Table:
    table = _table("r", "rows sent", "weights sent", "messages", "exchange", "compute", "total", "memory", "chosen")
    table.title = "Modes, exchanged directly, without overlap (a rank's share)"
    for way in plan.ways:
        if way.overlap_degree == 1 and not way.hierarchical:
            mode = way.cost
            table.add_row(
                str(mode.degree),
                show_bytes(mode.bytes_tokens),
                show_bytes(mode.bytes_weights),
                str(mode.messages),
                show_seconds(mode.seconds_exchange),
                show_seconds(mode.seconds_compute),
                show_seconds(mode.seconds_total),
                show_bytes(mode.memory),
                "auto" if mode.degree == plan.auto else "",
                style="bold" if mode.degree == plan.auto else None,
            )
    return table


def _ways(plan: Plan) -> Table:
    table = _table("r", "exchange by", "messages", "sent", "memory", *(f"d = {chunks}" for chunks in OVERLAP_DEGREES))
    table.title = "Total time where rows are exchanged, by overlap degree d"
    for degree in sorted({way.cost.degree for way in plan.ways} - {0}):
        for hierarchical in (False, True):
            ways = [plan.way(degree, chunks, hierarchical) for chunks in OVERLAP_DEGREES]
            whole = ways[0].cost
            table.add_row(
                str(degree),
                "node, then across" if hierarchical else "all ranks",
                str(whole.messages),
                show_bytes(whole.bytes_tokens),
                show_bytes(whole.memory),
                *(show_seconds(way.cost.seconds_total) for way in ways),
            )
    return table


def _name(way: Way) -> str:
    if way.cost.degree == 0:
        return "r = 0"
    return f"r = {way.cost.degree}, d = {way.overlap_degree}{', hierarchical' if way.hierarchical else ''}"


def _reason(plan: Plan) -> str:
    chosen = plan.way(plan.auto).cost
    others = [
        way.cost
        for way in plan.ways
        if way.overlap_degree == 1 and not way.hierarchical and way.cost.degree != plan.auto
    ]
    second = min(others, key=lambda mode: mode.seconds_total)
    return (
        f"{show_seconds(chosen.seconds_total)}. The next, r = {second.degree}, takes "
        f"{show_seconds(second.seconds_total - chosen.seconds_total)} more; it sends {_differences(second, chosen)}."
    )


def _differences(other: Cost, chosen: Cost) -> str:
    told = []
    for what, by in [("rows", other.bytes_tokens - chosen.bytes_tokens),
                     ("weights", other.bytes_weights - chosen.bytes_weights)]:  # fmt: skip
        if by:
            told.append(f"{show_bytes(abs(by))} {'more' if by > 0 else 'less'} of {what}")
    messages = other.messages - chosen.messages
    if messages:
        told.append(f"{abs(messages)} messages {'more' if messages > 0 else 'fewer'}")
    return ", ".join(told) if told else "the same"
