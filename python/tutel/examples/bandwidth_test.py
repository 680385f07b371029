"""Measure the bandwidth of collectives over a range of sizes: ``python3 -m tutel.examples.bandwidth_test``.

A size is that of a rank's whole buffer: what an all-to-all or an all-reduce has before and after, what a gathering
collective has after, and a scattering one before. The algorithm bandwidth is size / time; the bus bandwidth is what
each rank has to send of it, which can be compared with the speed of its link. One process alone sends nothing.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm
from tutel.distributed.groups import Group

from tutel import net, system
from tutel.examples import _shared


class Collective(NamedTuple):
    """A collective: its call, and how much of the buffer one of W ranks gives to it and has to send."""

    call: Callable[[Tensor, Group], object]
    given: Callable[[int], float]
    sent: Callable[[int], float]


def whole(_ranks: int) -> float:
    """All of the buffer."""
    return 1.0


def of_others(ranks: int) -> float:
    """The parts of the other ranks."""
    return (ranks - 1) / ranks


COLLECTIVES = {
    "all_to_all": Collective(lambda x, group: net.simple_all_to_all(x, group), whole, of_others),
    "all_gather": Collective(lambda x, group: net.simple_all_gather(x, group), lambda ranks: 1 / ranks, of_others),
    "reduce_scatter": Collective(lambda x, group: net.simple_reduce_scatter(x, group), whole, of_others),
    "all_reduce": Collective(
        lambda x, group: net.simple_all_reduce(x, group, inplace=True), whole, lambda ranks: 2 * of_others(ranks)
    ),
    "broadcast": Collective(lambda x, group: net.simple_broadcast(x, 0, group), whole, lambda ranks: min(ranks - 1, 1)),
}


def sizes(options: argparse.Namespace, ranks: int) -> Iterator[int]:
    """Give the numbers of elements, each twice the one before, rounded up to what divides among the ranks."""
    elements = options.min_elements
    while elements <= options.elements:
        yield -(-elements // ranks) * ranks
        elements *= 2


def seconds(collective: Collective, elements: int, group: Group, options: argparse.Namespace) -> float:
    """Return the time of a call, of the rank that took longest."""
    ranks = net.get_world_size(group)
    # Zeros, which stay zeros when they are summed over and over.
    dtype, count = _shared.DTYPES[options.dtype], round(elements * collective.given(ranks))
    given = torch.zeros(count, dtype=dtype, device=options.place)
    net.barrier(group)
    mine = system.perform(lambda: collective.call(given, group), options.num_loops)
    return float(net.simple_all_gather(torch.tensor([mine], dtype=torch.float64, device=options.place), group).max())


def as_size(number: int) -> str:
    """Write a number of bytes in the largest unit that fits."""
    value, units = float(number), ["B", "KiB", "MiB"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{value:.4g} {units[0]}"


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = _shared.bare_argument_parser(__doc__)
    add = parser.add_argument
    add("--collective", nargs="+", choices=list(COLLECTIVES), default=list(COLLECTIVES), help="which to measure")
    add("--dtype", choices=list(_shared.DTYPES), default="float32", help="of the elements")
    add("--min_elements", type=int, default=1 << 10, help="of the smallest buffer")
    add("--elements", type=int, default=1 << 24, help="of the largest buffer")
    add("--num_loops", type=int, default=20, help="calls of each size that are measured")
    add("--group_count", type=int, default=1, help="groups of neighbouring ranks that work apart; -n: of n ranks each")
    return _shared.parse(parser, arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program."""
    options = parse_arguments(arguments)
    session, options.place = _shared.start(options, options.group_count)
    group, ranks = session.model_group, session.model_size
    session.dist_print(
        f"[Benchmark] world_size = {session.global_size}, ranks of a group = {ranks}, device = {options.device}, "
        f"dtype = {options.dtype}, num_loops = {options.num_loops}"
    )
    session.dist_print(f"{'collective':<15} {'size':>12} {'time':>13} {'algorithm':>15} {'bus':>15}")
    cases = [(name, elements) for name in options.collective for elements in sizes(options, ranks)]
    width = torch.empty(0, dtype=_shared.DTYPES[options.dtype]).element_size()
    for name, elements in tqdm(cases, disable=session.global_rank > 0 or not sys.stderr.isatty(), leave=False):
        collective, size = COLLECTIVES[name], elements * width
        time = seconds(collective, elements, group, options)
        if session.global_rank == 0:
            rate = size / time * 1e-9
            tqdm.write(
                f"{name:<15} {as_size(size):>12} {time * 1e6:>10.1f} us {rate:>10.3f} GB/s "
                f"{rate * collective.sent(ranks):>10.3f} GB/s",
                file=sys.stdout,
            )


if __name__ == "__main__":
    main()
