"""Logits to a RoutePlan: who goes where, with which weight, and what is dropped."""

import dataclasses

import torch
from torch import Tensor

from tutel.config import RoutingConfig
from tutel.errors import check_number, check_tensor
from tutel.functional import assign_rows, select_experts
from tutel.sync import Sync


@dataclasses.dataclass(frozen=True)
class RoutePlan:
    """The routing decision, immutable once made. See :class:`tutel.functional.RowAssignment` for its indices.

    Attributes:
        num_experts: E.
        capacity: C, the drop threshold; None when nothing is dropped.
        topk_ids: [T, K] int32, chosen experts.
        topk_weights: [T, K] fp32 (fp64 for fp64), differentiable.
        slots: [T, K] int32.
        tokens_per_expert: [E] int64, before anything is dropped.
        offsets: [E + 1] int64, after.
        row_index: [T, K] int64.
        row_choice: [T * K] int64.
        first_choices: [E] int64, how many first choices each expert has; None where there were no scores.
        score_sums: [E] fp32 (fp64 for fp64), differentiable: scores summed over the tokens; None likewise.
        most_tokens: S, the tokens that the capacity was made for: the ranks' largest T, or this rank's; None likewise.
    """

    num_experts: int
    capacity: int | None
    topk_ids: Tensor
    topk_weights: Tensor
    slots: Tensor
    tokens_per_expert: Tensor
    offsets: Tensor
    row_index: Tensor
    row_choice: Tensor
    first_choices: Tensor
    score_sums: Tensor | None = None
    most_tokens: int | None = None

    @classmethod
    def from_topk(
        cls,
        topk_ids: Tensor,
        topk_weights: Tensor,
        num_experts: int,
        *,
        capacity: int | None = None,
        priority: Tensor | None = None,
    ) -> "RoutePlan":
        """Plan for choices that somebody else made.

        Args:
            topk_ids: [T, K] of any integer dtype, each -1 (no expert) or between 0 and E - 1.
            topk_weights: [T, K], floating point.
            num_experts: E.
            capacity: C, how many choices an expert keeps; None keeps all.
            priority: [T], who is served first within a choice; None means token order.

        Raises:
            TypeError: If an argument has the wrong type or dtype.
            ValueError: If shapes do not agree.
            RuntimeError: If an id is out of range.
        """
        check_tensor("topk_ids", topk_ids, dtypes=[torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8])
        check_tensor("topk_weights", topk_weights, shape=tuple(topk_ids.shape), like=("topk_ids", topk_ids))
        if topk_ids.dtype == torch.int64:
            # What does not fit in int32 must be refused as out of range, not wrapped to an id within.
            topk_ids = topk_ids.clamp(-(2**31), 2**31 - 1)
        ids = topk_ids.to(torch.int32)
        rows = assign_rows(ids, num_experts, capacity=capacity, priority=priority)
        return cls(
            num_experts=num_experts,
            capacity=capacity,
            topk_ids=ids,
            topk_weights=topk_weights,
            **rows._asdict(),
        )

    def largest_need(self) -> int | None:
        """Return how many rows an expert needs at most, without looking: min(C, S); None if nothing is dropped."""
        if self.capacity is None or self.most_tokens is None:
            return self.capacity
        return min(self.capacity, self.most_tokens)

    def padded_capacity(self) -> int:
        """Return how many rows an expert needs in a padded layout: C, or what was received where nothing is dropped.

        No expert receives more than T choices, since a token's choices differ.
        """
        if self.capacity is None:
            return int(self.tokens_per_expert.max())  # a host sync on a GPU: only dropless padded layouts need it
        return min(self.capacity, self.topk_ids.shape[0])


#: Rows are counted in int64.
_LARGEST_CAPACITY = 2**63 - 1


def drop_threshold(capacity_factor: float, num_tokens: int, num_experts: int, top_k: int) -> int | None:
    """Return the capacity C: slots per expert beyond which choices are dropped (the specification's section 2).

    With S tokens and factor f: f > 0 gives C = K * int(f * ceil(S / E)); f = 0 keeps everything (None); f < 0 gives
    min(needed, K * int(-f * ceil(S / E))), which drops exactly what K * int(-f * ceil(S / E)) alone drops.

    Raises:
        TypeError: If the factor is no number.
        ValueError: If it is not finite, or C does not fit in 64 bits.
    """
    factor = abs(check_number("capacity_factor", capacity_factor))
    if factor == 0:
        return None
    share = -(-num_tokens // num_experts)
    if isinstance(share, int) and factor * share * top_k >= _LARGEST_CAPACITY:
        raise ValueError(
            f"capacity_factor={capacity_factor!r} gives more slots per expert than 64 bits can count "
            f"({num_tokens} tokens, {num_experts} experts, top_k={top_k})"
        )
    slots: int = top_k * torch.sym_int(factor * share)  # int(), which torch.compile and torch.export trace too
    return slots


def route(logits: Tensor, config: RoutingConfig, sync: Sync, *, inequivalent_tokens: bool = False) -> RoutePlan:
    """Choose experts by the largest logits and plan the rows.

    Args:
        logits: [T, E], noise included; scores are their softmax.
        config: How to choose and what to drop.
        sync: Agreement with the other ranks.
        inequivalent_tokens: Whether ranks may hold different T; the capacity then counts the largest.
    """
    num_tokens, num_experts = logits.shape
    top_k = min(config.top_k, num_experts)
    chosen = select_experts(logits, top_k, normalize=config.normalize)
    counted = sync.max(num_tokens) if inequivalent_tokens else num_tokens
    capacity = drop_threshold(config.capacity_factor, counted, num_experts, top_k)
    priority = chosen.top_scores if config.prioritized else None
    rows = assign_rows(chosen.ids, num_experts, capacity=capacity, priority=priority)
    return RoutePlan(
        num_experts=num_experts,
        capacity=capacity,
        topk_ids=chosen.ids,
        topk_weights=chosen.weights,
        score_sums=chosen.score_sums,
        most_tokens=counted,
        **rows._asdict(),
    )
