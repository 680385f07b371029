"""The ways that rows take from the ranks of their tokens to the ranks of their experts, and back.

A trip is a list of steps, each of which moves rows on a rank or swaps them between ranks; the way back is the steps'
inverses in reverse. Rows start in the order of the ranks and experts they go to, and arrive in the order of the ranks
they come from, expert by expert within each.

Symbols: W ranks, e experts of a rank, L ranks of a node, N = W / L nodes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tutel.distributed.exchange import Flight, Swap, finish, start
from tutel.distributed.groups import Group, divide, world_rank
from tutel.distributed.handshake import exchange_counts
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


def direct_trips(counts: Tensor, group: Group, wire: Wire) -> list[Trip]:
    """Plan that every rank sends to every other. The ranks tell each other of all trips at once.

    Args:
        counts: [trips, W, e] int64, rows for each rank and each of its experts.
        group: The ranks.
        wire: How rows are written.
    """
    trips, _, experts = counts.shape
    told = exchange_counts(counts.transpose(0, 1).flatten(1), group)
    arrivals = told.view(-1, trips, experts).transpose(0, 1)
    return [
        Trip((Swap(sends, receives, group, wire),), came)
        for sends, receives, came in zip(counts.sum(2).tolist(), arrivals.sum(2).tolist(), arrivals, strict=True)
    ]


def fixed_trip(counts: Tensor, group: Group, wire: Wire) -> Trip:
    """Plan for counts [W, e] that all ranks know: every rank sends this one what it sends itself, and nobody asks."""
    arrivals = counts[world_rank(group)].expand_as(counts).cpu()
    return Trip((Swap(counts.sum(1).tolist(), arrivals.sum(1).tolist(), group, wire),), arrivals)


def hierarchical_trips(counts: Tensor, group: Group, node_size: int, wire: Wire) -> list[Trip]:
    """Plan to exchange inside nodes first, so that every rank then talks to one rank of each other node only.

    Rank (a, i), the i-th of node a, gives its rows for the ranks (b, j) of all nodes b to its neighbour (a, j), who
    sends what it has of all its neighbours to (b, j): L - 1 + N - 1 messages a rank instead of W - 1, and large ones
    across nodes.

    Args:
        counts: As :func:`direct_trips` takes them.
        group: The ranks.
        node_size: L, neighbouring ranks of one node.
        wire: How rows are written.
    """
    division = divide(node_size, group)
    trips, _, experts = counts.shape
    by_rank = counts.view(trips, -1, node_size, experts).permute(2, 0, 1, 3)  # (j, trip, b, expert)
    inside = exchange_counts(by_rank.flatten(1), division.neighbours).view(by_rank.shape)  # (i, trip, b, ..)
    by_node = inside.permute(2, 1, 0, 3)  # (b, trip, i, expert)
    across = exchange_counts(by_node.flatten(1).to(counts.device), division.strided)
    across = across.view(by_node.shape)  # (a, trip, i, expert)

    def trip(number: int) -> Trip:
        steps = (
            transpose_blocks(counts[number].sum(1).view(-1, node_size)),
            Swap(
                by_rank[:, number].sum((1, 2)).tolist(),
                inside[:, number].sum((1, 2)).tolist(),
                division.neighbours,
                wire,
            ),
            transpose_blocks(inside[:, number].sum(2).to(counts.device)),
            Swap(
                by_node[:, number].sum((1, 2)).tolist(), across[:, number].sum((1, 2)).tolist(), division.strided, wire
            ),
        )
        return Trip(steps, across[:, number].reshape(-1, experts))

    return [trip(number) for number in range(trips)]


def stay_trip(counts: Tensor) -> Trip:
    """Plan that rows stay where they are, as if counts [W, e] had arrived: for measuring what is not the exchange."""
    return Trip((), counts.cpu())


def transpose_blocks(sizes: Tensor) -> Move:
    """Return the move from blocks in the order of their sizes [A, B] int64 to the order of the transpose."""
    total = int(sizes.sum())
    before, after = _starts(sizes), _starts(sizes.T).T
    places = torch.arange(total, device=sizes.device)

    def shifted(by: Tensor, blocks: Tensor) -> Tensor:
        return places + torch.repeat_interleave(by.reshape(-1), blocks.reshape(-1), output_size=total)

    return Move(order=shifted((before - after).T, sizes.T), inverse=shifted(after - before, sizes))


def _starts(sizes: Tensor) -> Tensor:
    flat = sizes.reshape(-1)
    return (flat.cumsum(0) - flat).view(sizes.shape)
