"""All experts on this rank: rows are copies of tokens, nothing is exchanged."""

from dataclasses import dataclass

from torch import Tensor

from tutel.experts import ExpertWork, PaddedRows, Rows
from tutel.functional import Routes, accumulator_dtype, combine, dispatch, padded_rows
from tutel.route import RoutePlan


@dataclass(frozen=True)
class LocalHandle:
    """What combine needs.

    Attributes:
        row_index: [T, K] int64, row of each choice, -1 where it is dropped.
        row_choice: [R] int64, its inverse.
        weights: [T, K], None where they have been used.
    """

    row_index: Tensor
    row_choice: Tensor
    weights: Tensor | None


class LocalDispatcher:
    """Dispatch and combine on one rank.

    Args:
        weigh_inputs: Whether weights multiply the experts' inputs (score_at = dispatch) instead of their outputs.
    """

    def __init__(self, *, weigh_inputs: bool = False) -> None:
        self.weigh_inputs = weigh_inputs

    def run(self, tokens: Tensor, plan: RoutePlan, work: ExpertWork) -> Tensor:
        """Compute tokens [T, D] to [T, D_out]: without rows in between where weights and experts allow it."""
        if not self.weigh_inputs and work.takes_tokens(tokens):
            weights = plan.topk_weights.to(accumulator_dtype(tokens.dtype))
            return work.compute_tokens(
                tokens, Routes(plan.topk_ids, weights, plan.row_index, plan.row_choice), plan.offsets
            )
        rows, handle = self.dispatch(tokens, plan, padded=work.padded)
        return self.combine(work.compute(rows), handle)

    def dispatch(
        self, tokens: Tensor, plan: RoutePlan, *, padded: bool = False
    ) -> tuple[Rows | PaddedRows, LocalHandle]:
        """Bring tokens [T, D] to rows [R, D], or to [E, C, D]; the handle is what :meth:`combine` needs."""
        weights = plan.topk_weights.to(accumulator_dtype(tokens.dtype))
        row_index, row_choice = plan.row_index, plan.row_choice
        if padded:
            capacity = plan.padded_capacity()
            row_index, row_choice = padded_rows(plan.topk_ids, plan.slots, plan.num_experts, capacity)
        data = dispatch(tokens, row_index, row_choice, weights if self.weigh_inputs else None)
        handle = LocalHandle(row_index, row_choice, None if self.weigh_inputs else weights)
        if padded:
            return PaddedRows(data.view(plan.num_experts, capacity, data.shape[1])), handle
        return Rows(data, plan.offsets), handle

    def combine(self, rows: Rows | PaddedRows, handle: LocalHandle) -> Tensor:
        """Bring the experts' rows back to tokens [T, D_out]."""
        data = rows.data if isinstance(rows, Rows) else rows.data.reshape(-1, rows.data.shape[2])
        return combine(data, handle.row_index, handle.row_choice, handle.weights)
