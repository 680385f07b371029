"""Ragged where it can be, padded [e, C, D] where experts ask for it."""

from typing import Any

from torch import Tensor, nn

from tutel.experts.context import ExpertContext
from tutel.experts.ffn import FFNExperts
from tutel.experts.llama_ffn import LlamaFFNExperts
from tutel.experts.own import OwnExperts
from tutel.experts.precision import as_parameters, compute_dtype
from tutel.experts.rows import PaddedRows, Rows


def takes_padded(experts: nn.Module) -> bool:
    """Whether the experts take [e, C, D]: one's own say so; a user's class does."""
    return not isinstance(experts, OwnExperts) or experts.padded


def takes_tokens(experts: nn.Module, tokens: Tensor) -> bool:
    """Whether the experts compute these tokens by ``compute_tokens``, without rows in between."""
    if not isinstance(experts, FFNExperts | LlamaFFNExperts) or experts.fused() is None:
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
        assert isinstance(experts, OwnExperts)
        return experts.compute(rows, weights)
    if isinstance(experts, FFNExperts):
        output: object = experts.compute_padded(rows, weights).data
    else:
        output = experts(as_parameters(rows.data, experts), context)
    wanted = rows.data.shape[:2]
    if not isinstance(output, Tensor) or output.dim() != 3 or output.shape[:2] != wanted:
        found = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"the experts {type(experts).__name__} must return shape [{wanted[0]}, {wanted[1]}, D_out], got {found}"
        )
    return PaddedRows(output.to(rows.data.dtype))
