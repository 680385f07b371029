"""Which row goes to which rank.

Symbols: W ranks, e experts of a rank, n ranks that share an expert (then e = 1), r degree of model parallelism: the n
ranks are n / r subgroups of r members. A subgroup computes an expert together, each member its part of the hidden
units. Rank x * n + v * (n / r) + u is member v of subgroup u of expert x: neighbours are the same member of different
subgroups, who gather one part of the weights among themselves.
"""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from tutel.functional import assign_rows, padded_rows
from tutel.route import RoutePlan


@dataclass(frozen=True)
class SendPlan:
    """Rows in the order in which they leave. A choice has r of them, one a member.

    Attributes:
        row_index: [T, K * r] int64, row of a choice for a member, -1 where it is dropped.
        row_choice: [S] int64, its inverse.
        counts: [W, e] int64, rows for each expert of each rank.
    """

    row_index: Tensor
    row_choice: Tensor
    counts: Tensor


def plan_rows(plan: RoutePlan) -> tuple[Tensor, Tensor, Tensor]:
    """Return row_index [T, K], row_choice [kept] and tokens per expert [E] of the kept choices: nothing is padded."""
    kept = int(plan.offsets[-1])
    return plan.row_index, plan.row_choice[:kept], plan.offsets.diff()


def plan_padded(plan: RoutePlan, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the same with ``capacity`` rows an expert."""
    row_index, row_choice = padded_rows(plan.topk_ids, plan.slots, plan.num_experts, capacity)
    return row_index, row_choice, torch.full((plan.num_experts,), capacity, device=row_index.device)


def send_plan(
    row_index: Tensor, row_choice: Tensor, counts: Tensor, *, world_size: int, shards: int, degree: int
) -> SendPlan:
    """Plan where rows go.

    Args:
        row_index: [T, K] int64, rows expert by expert, -1 where there is none.
        row_choice: [R] int64, its inverse, -1 where a row is empty.
        counts: [E] int64, rows of each expert.
        world_size: W.
        shards: n.
        degree: r, a divisor of n.
    """
    if shards == 1:
        return SendPlan(row_index, row_choice, counts.view(world_size, -1))
    subgroups = shards // degree
    bounds = torch.arange(subgroups + 1, device=counts.device)
    pieces = (counts.unsqueeze(1) * bounds // subgroups).diff(dim=1)  # [E, n / r]
    to_ranks = pieces.unsqueeze(1).expand(-1, degree, -1).reshape(world_size, 1)
    if degree == 1:
        return SendPlan(row_index, row_choice, to_ranks)
    # Row p of an expert stands r times, once for each member, after r times the rows of the experts before.
    rows = row_choice.shape[0]
    before = counts.cumsum(0) - counts
    first = torch.arange(rows, device=counts.device) + torch.repeat_interleave(
        before * (degree - 1), counts, output_size=rows
    )
    step = torch.repeat_interleave(counts, counts, output_size=rows)
    members = torch.arange(degree, device=counts.device)
    places = first.unsqueeze(1) + step.unsqueeze(1) * members  # [R, r]
    copied = torch.where(row_choice.unsqueeze(1) >= 0, row_choice.unsqueeze(1) * degree + members, -1)
    index = torch.where(row_index.unsqueeze(2) >= 0, places[row_index.clamp(min=0)] if rows else -1, -1)
    choice = torch.empty(rows * degree, dtype=torch.int64, device=counts.device)
    choice[places.reshape(-1)] = copied.reshape(-1)
    return SendPlan(index.reshape(row_index.shape[0], row_index.shape[1] * degree), choice, to_ranks)


@dataclass(frozen=True)
class Chunk:
    """A part of a plan whose rows travel and are computed by themselves.

    Attributes:
        tokens: Which tokens.
        plan: Their plan.
    """

    tokens: slice
    plan: RoutePlan


def split_tokens(plan: RoutePlan, chunks: int) -> list[Chunk]:
    """Cut a plan into parts of neighbouring tokens; what is dropped was decided before."""
    num_tokens = plan.topk_ids.shape[0]
    if chunks == 1:
        return [Chunk(slice(0, num_tokens), plan)]
    kept = _kept(plan)
    bounds = [num_tokens * part // chunks for part in range(chunks + 1)]
    return [
        Chunk(slice(begin, end), _part(plan, kept[begin:end], slice(begin, end)))
        for begin, end in itertools.pairwise(bounds)
    ]


def split_slots(plan: RoutePlan, chunks: int, capacity: int) -> tuple[list[RoutePlan], int]:
    """Cut a plan into parts of neighbouring slots, each of all tokens; return them and their capacity."""
    size = -(-capacity // chunks)
    if chunks == 1:
        return [plan], size
    kept = _kept(plan)
    part = plan.slots // max(size, 1)
    everything = slice(None)
    return [_part(plan, torch.where(part == number, kept, -1), everything) for number in range(chunks)], size


def _kept(plan: RoutePlan) -> Tensor:
    return torch.where(plan.row_index >= 0, plan.topk_ids, -1)


def _part(plan: RoutePlan, topk_ids: Tensor, tokens: slice) -> RoutePlan:
    rows = assign_rows(topk_ids, plan.num_experts)
    return RoutePlan(plan.num_experts, None, topk_ids, plan.topk_weights[tokens], **rows._asdict())
