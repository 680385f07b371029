"""``tutel plan``: what each parallel mode costs for given sizes and links, as ``tutel.distributed.cost`` has it."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tutel import env
from tutel.commands import quantities
from tutel.distributed.cost import Cost, Links, Sizes, choose_degree, cost, valid_degrees
from tutel.errors import check_int

if TYPE_CHECKING:
    from argparse import _SubParsersAction

OVERLAP_DEGREES = (1, 2, 4, 8)
LARGEST_WORLD = 4096
_LOCAL_EXPERTS = 2
_ELEMENT_SIZES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}

ASSUMPTIONS = (
    "Rows are evenly divided among experts; routing, dispatch and combine, the same in every mode, are left out.",
    "An exchange needs no processor and meets no other traffic; a message of b bytes takes latency + b / bandwidth.",
    "The bandwidth between nodes is what each rank has while all ranks of its node send.",
    "Memory counts parameters, gradients, rows and hidden units, not the state of an optimizer.",
)
WEAK_SCALING = (
    "Weak scaling: tokens, top k and expert parameters of a rank stay, so the number of experts grows with W."
)


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to run a step, and its cost."""

    overlap_degree: int
    hierarchical: bool
    cost: Cost


@dataclasses.dataclass(frozen=True)
class Plan:
    """All ways for one number of ranks.

    Attributes:
        sizes: The layer and its input.
        ways: By degree, overlap degree, and direct before hierarchical exchange.
        auto: The degree that ``parallel_type='auto'`` chooses: without overlap, exchanged directly.
        fastest: The way of the fewest seconds.
    """

    sizes: Sizes
    ways: list[Way]
    auto: int
    fastest: Way

    def way(self, degree: int, overlap_degree: int = 1, hierarchical: bool = False) -> Way:
        """Return one of the ways."""
        wanted = (degree, overlap_degree, hierarchical)
        return next(way for way in self.ways if (way.cost.degree, way.overlap_degree, way.hierarchical) == wanted)


def make_plan(sizes: Sizes, links: Links, *, training: bool) -> Plan:
    """Cost every way; of equally fast ones the smallest degree, the least overlap, and the direct exchange win."""
    degrees = valid_degrees(sizes.shards)
    ways = [
        Way(chunks, staged, cost(sizes, links, r, training=training, overlap_degree=chunks, hierarchical=staged))
        for r in degrees
        # Where tokens stay there is no exchange to overlap or to stage.
        for chunks in (OVERLAP_DEGREES if r > 0 else (1,))
        for staged in ((False, True) if r > 0 else (False,))
    ]
    auto = choose_degree(sizes, links, degrees, training)
    return Plan(sizes, ways, auto, min(ways, key=lambda way: way.cost.seconds_total))


def add(subcommands: "_SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the subcommand."""
    parser = subcommands.add_parser(
        "plan",
        help="what each parallel mode costs for given sizes and links",
        description="Print bytes, messages, time and memory of a layer over W ranks in every parallel mode, as a model "
        "has them (docs/parallel.md). Nothing is run or measured.",
    )
    _add_layer(parser.add_argument_group("layer"))
    _add_machine(parser.add_argument_group("machine"))
    output = parser.add_argument_group("output").add_argument
    output("--inference", action="store_true", help="a forward only, not a training step")
    output("--scale", action="store_true", help=f"a curve over the number of ranks, up to {LARGEST_WORLD}")
    output("--json", action="store_true", help="print JSON")
    output("--plot", type=Path, metavar="FILE.png", help="draw it there, too (needs matplotlib)")
    parser.set_defaults(run=run)


def _add_layer(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--tokens", type=int, default=8192, metavar="T", help="tokens of a rank (default: %(default)s)")
    add("--model-dim", type=int, default=2048, metavar="D", help="width of a token (default: %(default)s)")
    add("--hidden", type=int, default=8192, metavar="H", help="hidden units of a whole expert (default: %(default)s)")
    add("--output-dim", type=int, metavar="D", help="width of an output (default: that of a token)")
    add("--top", type=int, default=2, metavar="K", help="experts of a token (default: %(default)s)")
    # No defaults: one that is given with its default's value would not count as given beside the other.
    experts = group.add_mutually_exclusive_group()
    experts.add_argument(
        "--local-experts", type=int, metavar="N", help=f"experts of a rank (default: {_LOCAL_EXPERTS})"
    )
    experts.add_argument("--shards", type=int, metavar="N", help="instead: ranks that share one expert")
    add("--capacity-factor", type=float, default=0.0, metavar="F", help="as the gate's (default: 0, drops nothing)")
    add("--gated", action="store_true", help="experts of three matrices and no biases, as llama_ffn")
    add("--dtype", choices=_ELEMENT_SIZES, default="bfloat16", help="of rows and weights (default: %(default)s)")


def _add_machine(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--world-size",
        type=int,
        default=16,
        metavar="W",
        help="number of ranks, where there is no --scale (default: %(default)s)",
    )
    add("--node-size", type=int, default=8, metavar="M", help="ranks of a node (default: %(default)s)")
    for option, (name, usual, read, meaning) in _MACHINE.items():
        help_text = f"{meaning} (default: {name} of TUTEL_LINKS, or {usual})"
        add(option, type=read, metavar=usual, default=argparse.SUPPRESS, help=help_text)


#: Options of the machine: name in TUTEL_LINKS, value where neither says, how it is read, what it is.
_MACHINE = {
    "--intra": ("intra", "200GB", quantities.bandwidth, "bytes a second that a rank sends inside its node"),
    "--inter": ("inter", "25GB", quantities.bandwidth, "the same to other nodes while all ranks of the node send"),
    "--latency-intra": ("latency", "5us", quantities.duration, "of a message inside a node"),
    "--latency-inter": ("latency", "10us", quantities.duration, "of a message between nodes"),
    "--rate": ("rate", "200T", quantities.rate, "floating-point operations a second of the experts' products"),
}


def links_of(options: argparse.Namespace) -> Links:
    """Return the machine: what options say, else the environment, else a usual one.

    Raises:
        ValueError: If one of them is out of range.
    """
    known = env.links()

    def value(option: str) -> float:
        name, usual, read, _ = _MACHINE[option]
        field = option.removeprefix("--").replace("-", "_")
        found: float = getattr(options, field, known[name] if name in known else read(usual))
        return found

    return Links(
        intra=value("--intra"),
        inter=value("--inter"),
        latency_intra=value("--latency-intra"),
        latency_inter=value("--latency-inter"),
        node_size=options.node_size,
        rate=value("--rate"),
    )


def _experts(options: argparse.Namespace, world_size: int) -> int:
    """Return E over so many ranks."""
    if options.shards is not None:
        return world_size // check_int("shards", options.shards, at_least=1)
    local = _LOCAL_EXPERTS if options.local_experts is None else options.local_experts
    return world_size * check_int("local_experts", local, at_least=1)


def sizes_of(options: argparse.Namespace, world_size: int) -> Sizes:
    """Return the layer's sizes over so many ranks.

    Raises:
        ValueError: If an option is out of range.
    """
    experts = _experts(options, check_int("world_size", world_size, at_least=1))
    if options.shards is not None and world_size % options.shards:
        raise ValueError(f"shards must divide world_size ({world_size}), got {options.shards}")
    return Sizes(
        tokens=options.tokens,
        model_dim=options.model_dim,
        hidden=options.hidden,
        output_dim=options.model_dim if options.output_dim is None else options.output_dim,
        num_experts=experts,
        top_k=options.top,
        world_size=world_size,
        element_size=_ELEMENT_SIZES[options.dtype],
        capacity_factor=options.capacity_factor,
        matrices=3 if options.gated else 2,
        biases=not options.gated,
    )


def _curve(options: argparse.Namespace, links: Links) -> list[Plan]:
    """Plan for n, 2 n, 4 n ... ranks, from the first on that have as many experts as a token chooses."""
    plans = []
    ranks = options.shards or 1
    while ranks <= LARGEST_WORLD:
        if options.top <= _experts(options, ranks):
            plans.append(make_plan(sizes_of(options, ranks), links, training=not options.inference))
        ranks *= 2
    if not plans:
        raise ValueError(f"--scale ends at {LARGEST_WORLD} ranks, which have fewer experts than top={options.top}")
    return plans


def run(options: argparse.Namespace) -> int:
    """Print the plan and return the exit status."""
    training = not options.inference
    try:
        links = links_of(options)
        if options.scale:
            plans = _curve(options, links)
        else:
            plans = [make_plan(sizes_of(options, options.world_size), links, training=training)]
    except (OverflowError, TypeError, ValueError) as error:
        print(f"tutel plan: error: {error}", file=sys.stderr)
        return 2
    # Only now: `tutel --help` needs no tables.
    from tutel.commands import plan_report

    if options.json:
        print(json.dumps(as_json(plans, links, options), indent=2))
    elif options.scale:
        plan_report.show_curve(plans, links, training=training)
    else:
        plan_report.show_plan(plans[0], links, training=training)
    if options.plot is None:
        return 0
    try:
        plan_report.draw(plans, options.plot, scale=options.scale)
    except (ImportError, OSError, ValueError) as error:
        print(f"tutel plan: error: --plot: {error}", file=sys.stderr)
        return 1
    return 0


def as_json(plans: list[Plan], links: Links, options: argparse.Namespace) -> dict[str, object]:
    """Return plans as plain data: sizes in bytes, times in seconds."""

    def of_way(way: Way) -> dict[str, object]:
        return {
            "overlap_degree": way.overlap_degree,
            "hierarchical": way.hierarchical,
            **dataclasses.asdict(way.cost),
        }

    return {
        "training": not options.inference,
        "links": dataclasses.asdict(links),
        "plans": [
            {
                "sizes": dataclasses.asdict(plan.sizes),
                "ways": [of_way(way) for way in plan.ways],
                "auto": plan.auto,
                "fastest": of_way(plan.fastest),
            }
            for plan in plans
        ],
        "assumptions": [*ASSUMPTIONS, *([WEAK_SCALING] if options.scale else [])],
    }
