"""Rows between ranks: every rank sends any number of rows to every other, and nothing is padded.

An exchange is two functions for autograd, one that starts it and one that waits for it, so that a program can compute
in between. The backward pass has the same two parts the other way round: where the forward pass waits, the gradient's
exchange is started, and where the forward pass starts, it is waited for.

Symbols: W ranks of the group.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable

from tutel.distributed.failure import stage
from tutel.distributed.groups import Group
from tutel.distributed.wire import Wire


@dataclasses.dataclass(frozen=True)
class Swap:
    """Who gets how many rows.

    Attributes:
        sends: [W] rows that go to each rank, in the ranks' order from the first row on.
        receives: [W] rows that come from each rank.
        group: The ranks.
        wire: How rows are written while they travel.
    """

    sends: list[int]
    receives: list[int]
    group: Group
    wire: Wire = dataclasses.field(default_factory=Wire)

    def back(self) -> "Swap":
        """Return the exchange that brings every row to where it came from."""
        return Swap(self.receives, self.sends, self.group, self.wire)


class Flight:
    """Rows on their way. It is written by the functions of autograd below and by nobody else."""

    def __init__(self, swap: Swap, what: str) -> None:
        self.swap = swap
        self.what = what
        self.pending: _Pending | None = None

    def take(self) -> Tensor:
        """Wait for the rows."""
        pending, self.pending = self.pending, None
        assert pending is not None
        return pending.wait()


def start(rows: Tensor, swap: Swap, what: str) -> tuple[Tensor, Flight]:
    """Start to exchange rows [sum(sends), D]; differentiable.

    Args:
        rows: Floating point.
        swap: Who gets which.
        what: What the rows are, in an error's words.

    Returns:
        What :func:`finish` takes. Every flight has to be finished, on every rank in the order of the starts.
    """
    flight = Flight(swap, what)
    ticket: Tensor = _Start.apply(rows, flight)
    return ticket, flight


def finish(ticket: Tensor, flight: Flight) -> Tensor:
    """Wait for the rows [sum(receives), D] of :func:`start`, in the order of the ranks that they come from."""
    rows: Tensor = _Finish.apply(ticket, flight)
    return rows


def tie(rows: Tensor, source: Tensor, *, needs_grad: bool) -> Tensor:
    """Return rows from which the backward pass goes on to their source, even where a user's module did not use that.

    Ranks exchange gradients together: none may leave one out that the others wait for.

    Args:
        rows: What was computed.
        source: What arrived from other ranks.
        needs_grad: Whether rows need a gradient even if their source does not.
    """
    if not torch.is_grad_enabled():
        return rows
    if source.requires_grad:
        tied: Tensor = _Tie.apply(rows, source)
        return tied
    return rows.detach().requires_grad_() if needs_grad and not rows.requires_grad else rows


class _Tie(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, source: Tensor) -> Tensor:  # noqa: ARG004  (it is tied)
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        return grad, None


class _Pending:
    """One exchange on its way; it keeps what is being sent alive."""

    def __init__(self, rows: Tensor, swap: Swap, what: str, *, gradient: bool) -> None:
        self.what, self.swap, self.gradient, self.dtype = what, swap, gradient, rows.dtype
        self.payload = swap.wire.pack(rows, gradient=gradient)
        self.buffer = self.payload.new_empty((sum(swap.receives), *self.payload.shape[1:]))
        with stage(what, swap.group):
            work = distributed.all_to_all_single(
                self.buffer, self.payload, swap.receives, swap.sends, group=swap.group, async_op=True
            )
        assert work is not None  # it is for operations that are not asynchronous
        self.work = work

    def wait(self) -> Tensor:
        with stage(self.what, self.swap.group):
            self.work.wait()
        return self.swap.wire.unpack(self.buffer, self.dtype, gradient=self.gradient)


# Between the two goes a tensor without elements: it carries the graph, while the rows are in the flight.
class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, flight: Flight) -> Tensor:
        ctx.flight = flight
        flight.pending = _Pending(rows.detach().contiguous(), flight.swap, flight.what, gradient=False)
        return rows.new_empty((0,))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _ticket_grad: Tensor) -> tuple[Tensor, None]:
        return ctx.flight.take(), None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ticket: Tensor, flight: Flight) -> Tensor:  # noqa: ARG004  (it carries the graph)
        ctx.flight = flight
        return flight.take()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        flight = ctx.flight
        what = f"gradient of {flight.what}"
        flight.pending = _Pending(grad.contiguous(), flight.swap.back(), what, gradient=True)
        return grad.new_empty((0,)), None
