"""The ways that rows take from the ranks of their tokens to the ranks of their experts, and back.

A trip is a list of steps, each of which moves rows on a rank or swaps them between ranks; the way back is the steps'
inverses in reverse. Rows start in the order of the ranks and experts they go to, and arrive in the order of the ranks
they come from, expert by expert within each.

Symbols: W ranks, e experts of a rank, L ranks of a node, N = W / L nodes.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tutel import env
from tutel.distributed.agreement import exchange_counts
from tutel.distributed.exchange import Flight, Swap, finish, start
from tutel.distributed.groups import Group, divide, world_rank
from tutel.distributed.wire import Wire
from tutel.functional import dispatch


@dataclass(frozen=True)
class Move:
    """Rows of one rank in another order.

    Attributes:
        order: [R] int64, where each row stands before.
        inverse: [R] int64, where each row stands after.
    """

    order: Tensor
    inverse: Tensor

    def back(self) -> "Move":
        """Return the move that undoes this one."""
        return Move(self.inverse, self.order)

    def apply(self, rows: Tensor) -> Tensor:
        """Move rows [R, D]; differentiable."""
        return dispatch(rows, self.inverse.unsqueeze(1), self.order)


@dataclass(frozen=True)
class Trip:
    """A way of rows.

    Attributes:
        steps: In order.
        arrivals: [W, e] int64 on the CPU, rows that arrive from each rank for each expert.
    """

    steps: tuple[Move | Swap, ...]
    arrivals: Tensor

    def back(self) -> "Trip":
        """Return the way back."""
        return Trip(tuple(step.back() for step in reversed(self.steps)), self.arrivals)

    def start(self, rows: Tensor, what: str) -> "Journey":
        """Set out with rows, up to the first swap, which goes on in the background."""
        if not self.steps:
            return Journey(self, 0, rows, None)
        position = 0
        while isinstance(step := self.steps[position], Move):
            rows, position = step.apply(rows), position + 1
        return Journey(self, position, *start(rows, step, what))


@dataclass(frozen=True)
class Journey:
    """Rows on a trip.

    Attributes:
        trip: The way.
        position: The step that is under way.
        ticket, flight: What finishes it; the rows themselves, and None, where they do not travel.
    """

    trip: Trip
    position: int
    ticket: Tensor
    flight: Flight | None

    def finish(self) -> Tensor:
        """Wait until the rows have arrived, and return them."""
        if self.flight is None:
            return self.ticket
        rows = finish(self.ticket, self.flight)
        for step in self.trip.steps[self.position + 1 :]:
            rows = step.apply(rows) if isinstance(step, Move) else finish(*start(rows, step, self.flight.what))
        return rows


def direct_trip(counts: Tensor, settings: Mapping[str, int], group: Group, wire: Wire) -> Trip:
    """Plan that every rank sends to every other.

    Args:
        counts: [W, e] int64, rows for each rank and each of its experts.
        settings: What all ranks have to have in common.
        group: The ranks.
        wire: How rows are written.
    """
    arrivals = exchange_counts(counts, settings, group)
    if env.skip_exchange():
        return Trip((), counts.cpu())
    return Trip((Swap(counts.sum(1).tolist(), arrivals.sum(1).tolist(), group, wire),), arrivals)


def fixed_trip(counts: Tensor, group: Group, wire: Wire) -> Trip:
    """Plan for counts that all ranks know: every rank sends this one what it sends itself, and nobody asks."""
    arrivals = counts[world_rank(group)].expand_as(counts).cpu()
    if env.skip_exchange():
        return Trip((), counts.cpu())
    return Trip((Swap(counts.sum(1).tolist(), arrivals.sum(1).tolist(), group, wire),), arrivals)


def hierarchical_trip(counts: Tensor, settings: Mapping[str, int], group: Group, node_size: int, wire: Wire) -> Trip:
    """Plan to exchange inside nodes first, so that every rank then talks to one rank of each other node only.

    Rank (a, i), the i-th of node a, gives its rows for the ranks (b, j) of all nodes b to its neighbour (a, j), who
    sends what it has of all its neighbours to (b, j): L - 1 + N - 1 messages a rank instead of W - 1, and large ones
    across nodes.

    Args:
        counts: As :func:`direct_trip`'s.
        settings: Likewise.
        group: The ranks.
        node_size: L, neighbouring ranks of one node.
        wire: How rows are written.
    """
    division = divide(node_size, group)
    nodes, experts = counts.shape[0] // node_size, counts.shape[1]
    by_rank = counts.view(nodes, node_size, experts).transpose(0, 1).contiguous()  # (j, b, expert)
    inside = exchange_counts(by_rank.view(node_size, -1), settings, division.neighbours)
    inside = inside.view(node_size, nodes, experts)  # (i, b, expert)
    by_node = inside.transpose(0, 1).contiguous()  # (b, i, expert)
    arrivals = exchange_counts(by_node.view(nodes, -1).to(counts.device), settings, division.strided)
    across = arrivals.view(nodes, -1)
    steps = (
        transpose_blocks(counts.sum(1).view(nodes, node_size)),
        Swap(by_rank.sum((1, 2)).tolist(), inside.sum((1, 2)).tolist(), division.neighbours, wire),
        transpose_blocks(inside.sum(2).to(counts.device)),
        Swap(by_node.sum((1, 2)).tolist(), across.sum(1).tolist(), division.strided, wire),
    )
    return Trip(steps, arrivals.view(-1, experts))


def transpose_blocks(sizes: Tensor) -> Move:
    """Return the move from blocks in the order of sizes [A, B] int64 to the order of its transpose."""
    total = int(sizes.sum())
    before, after = _starts(sizes), _starts(sizes.T).T
    places = torch.arange(total, device=sizes.device)

    def shifted(by: Tensor, blocks: Tensor) -> Tensor:
        return places + torch.repeat_interleave(by.reshape(-1), blocks.reshape(-1), output_size=total)

    return Move(order=shifted((before - after).T, sizes.T), inverse=shifted(after - before, sizes))


def _starts(sizes: Tensor) -> Tensor:
    flat = sizes.reshape(-1)
    return (flat.cumsum(0) - flat).view(sizes.shape)
