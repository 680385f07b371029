"""Collectives as differentiable functions of dimension 0, each with the one that is its gradient.

    exchange <-> exchange    gather <-> reduce_scatter    own_part -> gather    sum_forward <-> sum_backward

Gradients are those of the sum of the ranks' losses. Each is differentiable again.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tutel.distributed import transport
from tutel.distributed.groups import Group


class _Exchange(Function):
    """The i-th of W equal parts goes to rank i."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, name: str, group: Group, hierarchical: bool) -> Tensor:
        ctx.options = _gradient(name), group, hierarchical
        return transport.exchange(name, parts.contiguous(), group, hierarchical=hierarchical)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _apply(_Exchange, grad, *ctx.options), None, None, None


class _ExchangeRagged(Function):
    """The next ``sent[i]`` rows go to rank i."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, name: str, sent: Sequence[int], received: Sequence[int], group: Group
    ) -> Tensor:
        ctx.options = _gradient(name), received, sent, group
        return transport.exchange_ragged(name, rows.contiguous(), sent, received, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        return _apply(_ExchangeRagged, grad, *ctx.options), None, None, None, None


class _Gather(Function):
    """The ranks' parts are joined."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, name: str, group: Group) -> Tensor:
        ctx.options, ctx.shape = (_gradient(name), group), part.shape
        return transport.gather(name, part.contiguous(), group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _apply(_ReduceScatter, grad, *ctx.options).reshape(ctx.shape), None, None


class _ReduceScatter(Function):
    """The sum over the ranks is divided among them."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, name: str, group: Group) -> Tensor:
        ctx.options = _gradient(name), group
        return transport.reduce_scatter(name, parts.contiguous(), group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _apply(_Gather, grad, *ctx.options), None, None


class _OwnPart(Function):
    """A tensor that all ranks hold is divided among them."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, name: str, group: Group) -> Tensor:
        ctx.options = _gradient(name), group
        return transport.own_part(parts, group).contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _apply(_Gather, grad, *ctx.options), None, None


class _SumForward(Function):
    """The sum over the ranks; the gradient passes."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, name: str, group: Group) -> Tensor:
        ctx.options = _gradient(name), group
        return transport.all_reduce(name, copy(tensor), group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _apply(_SumBackward, grad, *ctx.options), None, None


class _SumBackward(Function):
    """The tensor passes; its gradient is summed over the ranks."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, name: str, group: Group) -> Tensor:
        ctx.options = _gradient(name), group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _apply(_SumForward, grad, *ctx.options), None, None


class _Begin(Function):
    """The first half of an exchange in the background: it is under way, and its output may not be read.

    In the backward pass the halves change places: :class:`_Finish` begins, and this one finishes.
    """

    @staticmethod
    def forward(ctx: Any, parts: Tensor, flights: "Flights") -> Tensor:
        ctx.flights = flights
        return flights.begin(flights.name, parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _grad: Tensor) -> tuple[Tensor, None]:
        return ctx.flights.finish(), None


class _Finish(Function):
    """The second half."""

    @staticmethod
    def forward(ctx: Any, under_way: Tensor, flights: "Flights") -> Tensor:
        ctx.flights = flights
        flights.finish()
        ctx.mark_dirty(under_way)
        return under_way

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.flights.begin(_gradient(ctx.flights.name), grad), None


class Flights:
    """An exchange in the background, and then that of its gradient.

    Args:
        name: The stage.
        group: The ranks.
        hierarchical: Inside nodes first, then across; the second step waits for :meth:`finish`.
    """

    def __init__(self, name: str, group: Group, hierarchical: bool) -> None:
        self.name, self.group, self.hierarchical = name, group, hierarchical
        self._flight: transport.Flight | None = None

    def begin(self, name: str, parts: Tensor) -> Tensor:
        """Start, and return where the result will be."""
        self._flight = transport.Flight(name, parts.contiguous(), self.group, hierarchical=self.hierarchical)
        return self._flight.output

    def finish(self) -> Tensor:
        """Wait for the result."""
        assert self._flight is not None
        output, self._flight = self._flight.land(), None
        return output


def exchange(parts: Tensor, name: str, group: Group, *, hierarchical: bool = False) -> Tensor:
    """Send the i-th of W equal parts of dimension 0 to rank i; the stage has that name."""
    return _apply(_Exchange, parts, name, group, hierarchical)


def exchange_in_background(
    parts: Tensor, name: str, group: Group, *, hierarchical: bool = False
) -> Callable[[], Tensor]:
    """Begin to :func:`exchange`; return what waits for the result. The gradient's exchange is in the background too."""
    flights = Flights(name, group, hierarchical)
    under_way = _apply(_Begin, parts, flights)
    return lambda: _apply(_Finish, under_way, flights)


def exchange_ragged(rows: Tensor, name: str, sent: Sequence[int], received: Sequence[int], group: Group) -> Tensor:
    """Send the next ``sent[i]`` rows of dimension 0 to rank i, and receive ``received[i]`` of it."""
    return _apply(_ExchangeRagged, rows, name, sent, received, group)


def gather(part: Tensor, name: str, group: Group) -> Tensor:
    """Join the ranks' equal parts along dimension 0."""
    return _apply(_Gather, part, name, group)


def reduce_scatter(parts: Tensor, name: str, group: Group) -> Tensor:
    """Sum over the ranks, and return this rank's of W equal parts of dimension 0."""
    return _apply(_ReduceScatter, parts, name, group)


def own_part(parts: Tensor, name: str, group: Group) -> Tensor:
    """Return this rank's of W equal parts of dimension 0 of what all ranks hold."""
    return _apply(_OwnPart, parts, name, group)


def sum_forward(tensor: Tensor, name: str, group: Group) -> Tensor:
    """Sum over the ranks; the gradient passes."""
    return _apply(_SumForward, tensor, name, group)


def sum_backward(tensor: Tensor, name: str, group: Group) -> Tensor:
    """Pass a tensor whose gradient is summed over the ranks."""
    return _apply(_SumBackward, tensor, name, group)


def copy(tensor: Tensor) -> Tensor:
    """Return a contiguous copy without a graph."""
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _apply(function: type[Function], tensor: Tensor, *options: object) -> Tensor:
    return cast(Tensor, function.apply(tensor, *options))


def _gradient(name: str) -> str:
    return f"gradient of {name.removeprefix('gradient of ')}"
