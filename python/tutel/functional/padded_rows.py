"""Slots to rows of a padded layout, in which every expert owns ``capacity`` rows."""

import torch
from torch import Tensor

from tutel.errors import check_int, check_tensor
from tutel.functional._operators import fake, operators


@fake("padded_rows")
def _fake(topk_ids: Tensor, slots: Tensor, num_experts: int, capacity: int) -> tuple[Tensor, Tensor]:
    return (
        topk_ids.new_empty(topk_ids.shape, dtype=torch.int64),
        topk_ids.new_empty((num_experts * capacity,), dtype=torch.int64),
    )


def padded_rows(topk_ids: Tensor, slots: Tensor, num_experts: int, capacity: int) -> tuple[Tensor, Tensor]:
    """Place choices in a padded layout: choice (t, j) in row ``topk_ids[t, j] * capacity + slots[t, j]``.

    Args:
        topk_ids: [T, K] int32, each -1 (no expert) or between 0 and E - 1.
        slots: [T, K] int32; a choice whose slot is negative or not below the capacity has no row.
        num_experts: E.
        capacity: Rows an expert.

    Returns:
        row_index [T, K] int64, -1 where a choice has no row, and its inverse row_choice [E * capacity] int64, -1 where
        a row is empty: the indices of :func:`tutel.functional.dispatch` and :func:`tutel.functional.combine`.

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If a shape or number is out of range.
        RuntimeError: If an id is out of range.
    """
    check_tensor("topk_ids", topk_ids, shape=(None, None), dtypes=[torch.int32])
    check_tensor("slots", slots, shape=tuple(topk_ids.shape), dtypes=[torch.int32], like=("topk_ids", topk_ids))
    if not isinstance(num_experts, torch.SymInt):
        check_int("num_experts", num_experts, at_least=1)
    if not isinstance(capacity, torch.SymInt):
        check_int("capacity", capacity, at_least=0)
    row_index, row_choice = operators.padded_rows(topk_ids.contiguous(), slots.contiguous(), num_experts, capacity)
    return row_index, row_choice
