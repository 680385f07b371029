"""Chosen experts to slots, counts and rows."""

from typing import NamedTuple

import torch
from torch import Tensor

from tutel.errors import check_int, check_tensor
from tutel.functional._operators import contiguous, fake, operators

_UNLIMITED = -1


class RowAssignment(NamedTuple):
    """What :func:`assign_rows` returns. None of it is differentiable.

    Attributes:
        slots: [T, K] int32, the place of a choice among all choices of its expert, dropped ones included; -1 where the
            choice names no expert.
        tokens_per_expert: [E] int64, choices that name the expert, dropped ones included.
        first_choices: [E] int64, first choices that name the expert.
        offsets: [E + 1] int64: expert e owns rows ``offsets[e]`` up to ``offsets[e + 1]``.
        row_index: [T, K] int64, the row of a choice, -1 where it is dropped.
        row_choice: [T * K] int64, the choice ``t * K + j`` of a row, -1 behind the last kept row.
    """

    slots: Tensor
    tokens_per_expert: Tensor
    first_choices: Tensor
    offsets: Tensor
    row_index: Tensor
    row_choice: Tensor


@fake("assign_rows")
def _fake(
    topk_ids: Tensor, priority: Tensor | None, num_experts: int, capacity: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    tokens, top_k = topk_ids.shape
    return (
        topk_ids.new_empty((tokens, top_k)),
        topk_ids.new_empty((num_experts,), dtype=torch.int64),
        topk_ids.new_empty((num_experts,), dtype=torch.int64),
        topk_ids.new_empty((num_experts + 1,), dtype=torch.int64),
        topk_ids.new_empty((tokens, top_k), dtype=torch.int64),
        topk_ids.new_empty((tokens * top_k,), dtype=torch.int64),
    )


def assign_rows(
    topk_ids: Tensor, num_experts: int, *, capacity: int | None = None, priority: Tensor | None = None
) -> RowAssignment:
    """Give every choice a slot in its expert and, if the slot is below the capacity, a row.

    All first choices come before all second choices; within a choice tokens come in their order, or in descending
    order of their priority (stable, NaN last). Rows stand expert by expert, without gaps.

    Args:
        topk_ids: [T, K] int32, each -1 (no expert) or between 0 and E - 1.
        num_experts: E.
        capacity: C, how many choices an expert keeps; None keeps all.
        priority: [T] float32 or float64.

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If a shape or number is out of range.
        RuntimeError: If an id is out of range.
    """
    check_tensor("topk_ids", topk_ids, shape=(None, None), dtypes=[torch.int32])
    if not isinstance(num_experts, torch.SymInt):
        check_int("num_experts", num_experts, at_least=1)
    if capacity is not None and not isinstance(capacity, torch.SymInt):
        check_int("capacity", capacity, at_least=0)
    if priority is not None:
        check_tensor(
            "priority",
            priority,
            shape=(topk_ids.shape[0],),
            dtypes=[torch.float32, torch.float64],
            like=("topk_ids", topk_ids),
        )
    limit = _UNLIMITED if capacity is None else capacity
    return RowAssignment(*operators.assign_rows(topk_ids.contiguous(), contiguous(priority), num_experts, limit))
