"""Experts on other ranks: rows go to the ranks of their experts, are computed there, and come back.

With several chunks, a chunk's rows travel while those of another are computed, forward and backward:

    start 0, start 1, ..; finish 0, compute 0, start back 0, finish 1, compute 1, start back 1, ..; finish back 0, ..

Every rank does all of it in the same order whatever its number of tokens, none included, so that no rank waits for
one that has nothing to send.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tutel.dispatcher.send import SendPlan, plan_padded, plan_rows, send_plan, split_slots, split_tokens
from tutel.distributed.agreement import agree
from tutel.distributed.exchange import tie
from tutel.distributed.groups import Group, world_size
from tutel.distributed.handshake import GroupSync
from tutel.distributed.trip import (
    Journey,
    Trip,
    direct_trips,
    fixed_trip,
    hierarchical_trips,
    stay_trip,
    transpose_blocks,
)
from tutel.distributed.wire import Wire
from tutel.experts import ExpertWork, PaddedRows, Rows
from tutel.functional import Routes, accumulator_dtype, combine, dispatch, padded_rows
from tutel.route import RoutePlan


@dataclass(frozen=True)
class ExchangeOptions:
    """How a forward pass exchanges rows.

    Attributes:
        group: The ranks.
        shards: n, ranks that share an expert.
        degree: r, see :mod:`tutel.dispatcher.send`.
        chunks: Parts that travel and are computed by themselves.
        node_size: Ranks of a node if rows go inside nodes first, then across; None if they go straight.
        wire: How rows are written while they travel.
        weigh_inputs: Whether weights multiply the experts' inputs instead of their outputs.
        skip: Whether rows stay where they are, to measure all but the exchange.
    """

    group: Group
    shards: int = 1
    degree: int = 1
    chunks: int = 1
    node_size: int | None = None
    wire: Wire = field(default_factory=Wire)
    weigh_inputs: bool = False
    skip: bool = False


@dataclass(frozen=True)
class _Sent:
    """A chunk on its way to the experts."""

    plan: SendPlan
    weights: Tensor
    trip: Trip
    journey: Journey


class ExchangeDispatcher(ABC):
    """What the ways to exchange rows have in common."""

    def __init__(self, options: ExchangeOptions) -> None:
        self.options = options
        self.world_size = world_size(options.group)

    @abstractmethod
    def run(self, tokens: Tensor, plan: RoutePlan, work: ExpertWork) -> Tensor:
        """Compute tokens [T, D] by the experts of all ranks: [T, D_out]."""

    def _exchange(
        self,
        tokens: Sequence[Tensor],
        plans: Sequence[tuple[SendPlan, Tensor]],
        trips: Sequence[Trip],
        work: ExpertWork,
    ) -> list[Tensor]:
        """Send, compute, bring back and combine all chunks."""
        if self.options.skip:
            trips = [stay_trip(plan.counts) for plan, _ in plans]
        sent = [self._send(*parts) for parts in zip(tokens, plans, trips, strict=True)]
        back = []
        for chunk in sent:
            arrived = chunk.journey.finish()
            rows = compute_arrivals(arrived, chunk.trip.arrivals, work)
            rows = self._ready_to_go_back(rows, arrived, work)
            back.append(chunk.trip.back().start(rows, "rows from the experts"))
        return [self._combine(chunk, journey.finish()) for chunk, journey in zip(sent, back, strict=True)]

    def _ready_to_go_back(self, rows: Tensor, arrived: Tensor, work: ExpertWork) -> Tensor:
        if work.takes_tokens(arrived):
            return rows
        if not hasattr(work.experts, "output_dim"):  # a user's own: their width was not known before
            agree("rows from the experts", rows[:0], self.options.group)
        return tie(rows, arrived, needs_grad=work.needs_grad())

    def _send(self, tokens: Tensor, plan_and_weights: tuple[SendPlan, Tensor], trip: Trip) -> _Sent:
        plan, weights = plan_and_weights
        weights = weights.to(accumulator_dtype(tokens.dtype)).repeat_interleave(
            plan.row_index.shape[1] // weights.shape[1], dim=1
        )
        rows = dispatch(tokens, plan.row_index, plan.row_choice, weights if self.options.weigh_inputs else None)
        return _Sent(plan, weights, trip, trip.start(rows, "rows to the experts"))

    def _combine(self, chunk: _Sent, rows: Tensor) -> Tensor:
        weights = None if self.options.weigh_inputs else chunk.weights
        return combine(rows, chunk.plan.row_index, chunk.plan.row_choice, weights)

    def _send_plan(self, rows: tuple[Tensor, Tensor, Tensor]) -> SendPlan:
        options = self.options
        return send_plan(*rows, world_size=self.world_size, shards=options.shards, degree=options.degree)


class RaggedDispatcher(ExchangeDispatcher):
    """Ranks tell each other how many rows come, then send exactly those."""

    def run(self, tokens: Tensor, plan: RoutePlan, work: ExpertWork) -> Tensor:
        """Compute tokens [T, D] by the experts of all ranks: [T, D_out]."""
        chunks = split_tokens(plan, self.options.chunks)
        plans = [(self._send_plan(plan_rows(chunk.plan)), chunk.plan.topk_weights) for chunk in chunks]
        trips = self._trips([send for send, _ in plans])
        outputs = self._exchange([tokens[chunk.tokens] for chunk in chunks], plans, trips, work)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _trips(self, plans: list[SendPlan]) -> list[Trip]:
        options = self.options
        counts = torch.stack([plan.counts for plan in plans])
        if options.node_size is None:
            return direct_trips(counts, options.group, options.wire)
        return hierarchical_trips(counts, options.group, options.node_size, options.wire)


class FixedDispatcher(ExchangeDispatcher):
    """Every rank sends as many rows as the capacity to every expert, empty ones included: no number depends on data."""

    def run(self, tokens: Tensor, plan: RoutePlan, work: ExpertWork) -> Tensor:
        """Compute tokens [T, D] by the experts of all ranks: [T, D_out]."""
        options = self.options
        capacity = plan.largest_need()
        if capacity is None:  # the ranks have to find out how many rows an expert needs at most
            capacity = GroupSync(options.group, tokens.device).max(plan.padded_capacity())
        parts, size = split_slots(plan, options.chunks, capacity)
        plans = [(self._send_plan(plan_padded(part, size)), part.topk_weights) for part in parts]
        trips = [fixed_trip(send.counts, options.group, options.wire) for send, _ in plans]
        outputs = self._exchange([tokens] * len(plans), plans, trips, work)
        return outputs[0] if len(outputs) == 1 else torch.stack(outputs).sum(0)


def compute_arrivals(data: Tensor, arrivals: Tensor, work: ExpertWork) -> Tensor:
    """Compute rows that came from other ranks, and leave them in their order.

    Args:
        data: [R, D], rank by rank, and expert by expert within each.
        arrivals: [W, e] int64 on the CPU, how many.
        work: The experts. They read each row where it is: sorting rows by expert is part of packing them.
    """
    per_expert = arrivals.sum(0)
    experts = arrivals.shape[1]
    offsets = torch.zeros(experts + 1, dtype=torch.int64)
    offsets[1:] = per_expert.cumsum(0)
    if work.padded:
        return _compute_padded(data, arrivals, offsets, work)
    offsets = offsets.to(data.device)
    if experts == 1:
        return work.compute(Rows(data, offsets)).data
    move = transpose_blocks(arrivals)
    order, inverse = move.order.to(data.device), move.inverse.to(data.device).unsqueeze(1)
    if work.takes_tokens(data):
        topk_ids = _experts_of(arrivals).to(data.device).unsqueeze(1)
        ones = torch.ones((data.shape[0], 1), dtype=accumulator_dtype(data.dtype), device=data.device)
        return work.compute_tokens(data, Routes(topk_ids, ones, inverse, order), offsets)
    rows = work.compute(Rows(dispatch(data, inverse, order), offsets)).data
    return dispatch(rows, order.unsqueeze(1), inverse.squeeze(1))


def _compute_padded(data: Tensor, arrivals: Tensor, offsets: Tensor, work: ExpertWork) -> Tensor:
    """Give each expert equally many rows, the received ones first."""
    experts, capacity = arrivals.shape[1], int(arrivals.sum(0).max())
    ids = _experts_of(arrivals)
    slots = (transpose_blocks(arrivals).inverse - offsets[ids]).to(torch.int32)
    row_index, row_choice = padded_rows(
        ids.to(data.device).unsqueeze(1), slots.to(data.device).unsqueeze(1), experts, capacity
    )
    padded = PaddedRows(dispatch(data, row_index, row_choice).view(experts, capacity, data.shape[1]))
    output = work.compute(padded).data
    return combine(output.reshape(-1, output.shape[2]), row_index, row_choice)


def _experts_of(arrivals: Tensor) -> Tensor:
    """Return which expert each row that arrived is for, [R] int32."""
    ids = torch.arange(arrivals.shape[1], dtype=torch.int32).repeat(arrivals.shape[0])
    return torch.repeat_interleave(ids, arrivals.reshape(-1))
