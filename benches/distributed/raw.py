"""Bare collectives of Gloo, and what the cost model says about them."""

import dataclasses
from dataclasses import dataclass

import torch
from torch import distributed
from tutel.distributed.cost import Links, Sizes, cost

from benches.distributed.sampling import Effort, alternate
from benches.harness import Spread

#: Bytes that a rank exchanges.
EXCHANGED = (2**12, 2**16, 2**20, 2**23)


@dataclass(frozen=True)
class Bare:
    """One collective: bytes that a rank sends to others, measured and modelled seconds."""

    name: str
    sent: int
    seconds: Spread
    model: float


def measure(links: Links, effort: Effort) -> list[Bare]:
    """Measure bare exchanges and gathers of several sizes."""
    ranks = distributed.get_world_size()
    sides = {}
    models = {}
    for size in EXCHANGED:
        given = torch.ones(size // 4)
        taken = torch.empty_like(given)
        name = f"all_to_all {_size(size)}"
        sides[name] = lambda taken=taken, given=given: distributed.all_to_all_single(taken, given)
        part = given[: given.numel() // ranks]
        gathered = torch.empty_like(given)
        gather = f"all_gather {_size(size)}"
        sides[gather] = lambda gathered=gathered, part=part: distributed.all_gather_into_tensor(gathered, part)
        models[name] = size // ranks * (ranks - 1), _exchange_seconds(size, ranks, links)
        models[gather] = size // ranks * (ranks - 1), _gather_seconds(size // ranks, ranks, links)
    seconds = alternate(sides, effort)
    return [Bare(name, models[name][0], Spread.of(seconds[name]), models[name][1]) for name in sides]


def _exchange_seconds(size: int, ranks: int, links: Links) -> float:
    """Return what the model has for one all-to-all: by what an exchange there and back takes longer for more rows."""
    with_rows, without = (
        cost(Sizes(rows, 1, 1, 1, ranks, 1, ranks, 1, biases=False), links, 1, training=False) for rows in (size, 0)
    )
    # Without rows there are still the latencies of the two exchanges and of the counts.
    latencies = (ranks - 1) * links.latency_intra
    return (with_rows.seconds_exchange - without.seconds_exchange) / 2 + latencies


def _gather_seconds(part: int, ranks: int, links: Links) -> float:
    """Return what the model has for an all-gather: of two equal matrices, half of it."""
    sizes = Sizes(0, 1, part, 1, ranks, 1, ranks, 1, biases=False)
    # Nothing is compared before a bare collective.
    bare = dataclasses.replace(links, compares=False)
    return cost(sizes, bare, 0, training=False).seconds_exchange / 2


def _size(size: int) -> str:
    return f"{size >> 20} MiB" if size >= 1 << 20 else f"{size >> 10} KiB"
