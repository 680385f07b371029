"""Tokens to expert-major rows."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tutel.errors import check_tensor
from tutel.functional._operators import accumulator_dtype, contiguous, fake, operators


@fake("dispatch")
def _fake(tokens: Tensor, row_choice: Tensor, weights: Tensor | None, top_k: int) -> Tensor:
    return tokens.new_empty((row_choice.shape[0], tokens.shape[1]))


@fake("row_dot")
def _fake_row_dot(rows: Tensor, row_index: Tensor, tokens: Tensor) -> Tensor:
    return rows.new_empty(row_index.shape, dtype=accumulator_dtype(rows.dtype))


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weights: Tensor | None, row_index: Tensor, row_choice: Tensor) -> Tensor:
        needs_tokens = weights is not None and ctx.needs_input_grad[1]
        ctx.save_for_backward(tokens if needs_tokens else None, weights, row_index)
        rows: Tensor = operators.dispatch(tokens, row_choice, weights, row_index.shape[1])
        return rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        tokens, weights, row_index = ctx.saved_tensors
        grad = grad.contiguous()
        grad_tokens = operators.combine(grad, row_index, weights) if ctx.needs_input_grad[0] else None
        grad_weights = operators.row_dot(grad, row_index, tokens) if ctx.needs_input_grad[1] else None
        return grad_tokens, grad_weights, None, None


def dispatch(tokens: Tensor, row_index: Tensor, row_choice: Tensor, weights: Tensor | None = None) -> Tensor:
    """Copy tokens to the rows of their experts.

    Row r is token ``row_choice[r] // K``, times the choice's weight if there are weights; zero where that is -1.

    Args:
        tokens: [T, D], floating point (differentiable).
        row_index: [T, K] int64, see :class:`tutel.functional.RowAssignment`.
        row_choice: [R] int64, the inverse of row_index.
        weights: [T, K] in fp32, or fp64 for fp64 tokens (differentiable).

    Returns:
        [R, D] in the dtype of tokens.

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If shapes or devices do not agree.
    """
    check_tensor("tokens", tokens, shape=(None, None))
    like = ("tokens", tokens)
    check_tensor("row_index", row_index, shape=(tokens.shape[0], None), dtypes=[torch.int64], like=like)
    check_tensor("row_choice", row_choice, shape=(None,), dtypes=[torch.int64], like=like)
    check_weights(weights, row_index, like)
    rows: Tensor = _Dispatch.apply(
        tokens.contiguous(), contiguous(weights), row_index.contiguous(), row_choice.contiguous()
    )
    return rows


def check_weights(weights: Tensor | None, row_index: Tensor, like: tuple[str, Tensor]) -> None:
    """Check the routing weights of an operator on tensors ``like``."""
    if weights is not None:
        dtype = accumulator_dtype(like[1].dtype)
        check_tensor("weights", weights, shape=tuple(row_index.shape), dtypes=[dtype], like=like)
