"""Ragged where it can be, padded [e, C, D] where experts ask for it."""

from typing import Any

from torch import Tensor, nn

from tutel.experts.context import ExpertContext
from tutel.experts.precision import as_parameters, compute_dtype
from tutel.experts.rows import PaddedRows, Rows


def takes_padded(experts: nn.Module) -> bool:
    """Whether the experts take [e, C, D]: one's own say so; a user's class does."""
    return bool(getattr(experts, "padded", True)) or not hasattr(experts, "compute")


def takes_tokens(experts: nn.Module, tokens: Tensor) -> bool:
    """Whether the experts compute these tokens by ``compute_tokens``, without rows in between."""
    if not hasattr(experts, "compute_tokens") or experts.fused() is None:  # type: ignore[operator]
        return False
    # Where somebody computes in another dtype, rows are cast before and after.
    return all(
        compute_dtype(tokens, parameter) == tokens.dtype == parameter.dtype for parameter in experts.parameters()
    )


def compute_experts(
    experts: nn.Module, rows: Rows | PaddedRows, weights: Any, context: ExpertContext
) -> Rows | PaddedRows:
    """Compute the rows in the layout that :func:`takes_padded` asked for.

    Raises:
        ValueError: If a user's experts do not return [e, C, D_out].
    """
    if isinstance(rows, Rows):
        ragged: Rows = experts.compute(rows, weights)  # type: ignore[operator]
        return ragged
    if hasattr(experts, "compute_padded"):
        padded: PaddedRows = experts.compute_padded(rows, weights)  # type: ignore[operator]
        output: object = padded.data
    else:
        output = experts(as_parameters(rows.data, experts), context)
    wanted = rows.data.shape[:2]
    if not isinstance(output, Tensor) or output.dim() != 3 or output.shape[:2] != wanted:
        found = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"the experts {type(experts).__name__} must return shape [{wanted[0]}, {wanted[1]}, D_out], got {found}"
        )
    return PaddedRows(output.to(rows.data.dtype))
