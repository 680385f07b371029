"""Rows back to tokens."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tutel.errors import check_tensor
from tutel.functional._operators import contiguous, fake, operators
from tutel.functional.dispatch import check_weights


@fake("combine")
def _fake(rows: Tensor, row_index: Tensor, weights: Tensor | None) -> Tensor:
    return rows.new_empty((row_index.shape[0], rows.shape[1]))


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor | None, row_index: Tensor, row_choice: Tensor) -> Tensor:
        needs_rows = weights is not None and ctx.needs_input_grad[1]
        ctx.save_for_backward(rows if needs_rows else None, weights, row_index, row_choice)
        output: Tensor = operators.combine(rows, row_index, weights)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        rows, weights, row_index, row_choice = ctx.saved_tensors
        grad = grad.contiguous()
        grad_rows = grad_weights = None
        if ctx.needs_input_grad[0]:
            grad_rows = operators.dispatch(grad, row_choice, weights, row_index.shape[1])
        if ctx.needs_input_grad[1]:
            grad_weights = operators.row_dot(rows, row_index, grad)
        return grad_rows, grad_weights, None, None


def combine(rows: Tensor, row_index: Tensor, row_choice: Tensor, weights: Tensor | None = None) -> Tensor:
    """Add up the rows of each token.

    Token t is the sum over its choices j of ``weights[t, j] * rows[row_index[t, j]]``; dropped ones (-1) add nothing.
    Sums are made in fp32 (fp64 for fp64) in the order of the choices and rounded once.

    Args:
        rows: [R, D], floating point (differentiable).
        row_index: [T, K] int64, see :class:`tutel.functional.RowAssignment`.
        row_choice: [R] int64, the inverse of row_index.
        weights: [T, K] in fp32, or fp64 for fp64 rows (differentiable); None means 1.

    Returns:
        [T, D] in the dtype of rows.

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If shapes or devices do not agree.
    """
    check_tensor("rows", rows, shape=(None, None))
    like = ("rows", rows)
    check_tensor("row_index", row_index, shape=(None, None), dtypes=[torch.int64], like=like)
    check_tensor("row_choice", row_choice, shape=(rows.shape[0],), dtypes=[torch.int64], like=like)
    check_weights(weights, row_index, like)
    output: Tensor = _Combine.apply(
        rows.contiguous(), contiguous(weights), row_index.contiguous(), row_choice.contiguous()
    )
    return output
