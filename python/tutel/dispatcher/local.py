"""All experts on this rank: rows are copies of tokens, nothing is exchanged."""

from torch import Tensor

from tutel.experts import Rows
from tutel.functional import accumulator_dtype, combine, dispatch
from tutel.route import RoutePlan


class LocalDispatcher:
    """Dispatch and combine on one rank.

    Args:
        weigh_inputs: Whether weights multiply the experts' inputs (score_at = dispatch) instead of their outputs.
    """

    def __init__(self, *, weigh_inputs: bool = False) -> None:
        self.weigh_inputs = weigh_inputs

    def dispatch(self, tokens: Tensor, plan: RoutePlan) -> tuple[Rows, RoutePlan]:
        """Bring tokens [T, D] to rows [R, D]; the handle that comes along is what :meth:`combine` needs."""
        weights = plan.topk_weights.to(accumulator_dtype(tokens.dtype)) if self.weigh_inputs else None
        return Rows(dispatch(tokens, plan.row_index, plan.row_choice, weights), plan.offsets), plan

    def combine(self, rows: Rows, handle: RoutePlan) -> Tensor:
        """Bring the experts' rows [R, D_out] back to tokens [T, D_out]."""
        weights = None if self.weigh_inputs else handle.topk_weights.to(accumulator_dtype(rows.data.dtype))
        return combine(rows.data, handle.row_index, handle.row_choice, weights)
