"""The experts' products: ragged rows times one matrix an expert."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tutel.errors import check_tensor
from tutel.functional._operators import contiguous, fake, operators


@fake("grouped_gemm")
def _fake(rows: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor, transposed: bool) -> Tensor:
    return rows.new_empty((rows.shape[0], weight.shape[1 if transposed else 2]))


@fake("grouped_gemm_pair")
def _fake_pair(
    rows: Tensor, weight: Tensor, other_rows: Tensor, other_weight: Tensor, offsets: Tensor, transposed: bool
) -> Tensor:
    return rows.new_empty((rows.shape[0], weight.shape[1 if transposed else 2]))


@fake("grouped_gemm_weight_grad")
def _fake_weight_grad(
    left: Tensor, right: Tensor, offsets: Tensor, left_choice: Tensor | None, right_choice: Tensor | None, top_k: int
) -> Tensor:
    return left.new_empty((offsets.shape[0] - 1, left.shape[1], right.shape[1]))


@fake("grouped_sum")
def _fake_sum(rows: Tensor, offsets: Tensor) -> Tensor:
    return rows.new_empty((offsets.shape[0] - 1, rows.shape[1]))


class _GroupedGemm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor, transposed: bool
    ) -> Tensor:
        needs_rows, needs_weight = ctx.needs_input_grad[1], ctx.needs_input_grad[0]
        ctx.save_for_backward(rows if needs_rows else None, weight if needs_weight else None, offsets)
        ctx.transposed = transposed
        output: Tensor = operators.grouped_gemm(rows, weight, bias, offsets, transposed)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        rows, weight, offsets = ctx.saved_tensors
        grad = grad.contiguous()
        grad_rows = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_rows = operators.grouped_gemm(grad, weight, None, offsets, not ctx.transposed)
        if ctx.needs_input_grad[1]:
            left, right = (grad, rows) if ctx.transposed else (rows, grad)
            grad_weight = operators.grouped_gemm_weight_grad(left, right, offsets, None, None, 1)
        if ctx.needs_input_grad[2]:
            grad_bias = operators.grouped_sum(grad, offsets)
        return grad_rows, grad_weight, grad_bias, None, None


def grouped_gemm(
    rows: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None = None, *, transposed: bool = False
) -> Tensor:
    """Multiply each expert's rows by its matrix: ``output[r] = rows[r] @ weight[e] + bias[e]``.

    Args:
        rows: [R, D], floating point, expert by expert (differentiable).
        weight: [E, D, N], or [E, N, D] when transposed, in the dtype of rows (differentiable).
        offsets: [E + 1] int64: expert e owns rows ``offsets[e]`` up to ``offsets[e + 1]``.
        bias: [E, N] in the dtype of rows (differentiable).
        transposed: The layout of weight. Neither layout is copied.

    Returns:
        [R, N]; zero in rows behind ``offsets[E]``, which belong to no expert.

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If shapes or devices do not agree.
        RuntimeError: If offsets do not ascend from 0 within the rows.
    """
    check_tensor("rows", rows, shape=(None, None))
    like = ("rows", rows)
    width = rows.shape[1]
    shape = (None, None, width) if transposed else (None, width, None)
    check_tensor("weight", weight, shape=shape, dtypes=[rows.dtype], like=like)
    experts, outer = weight.shape[0], weight.shape[1 if transposed else 2]
    check_tensor("offsets", offsets, shape=(experts + 1,), dtypes=[torch.int64], like=like)
    if bias is not None:
        check_tensor("bias", bias, shape=(experts, outer), dtypes=[rows.dtype], like=like)
    output: Tensor = _GroupedGemm.apply(
        rows.contiguous(), weight.contiguous(), contiguous(bias), offsets.contiguous(), transposed
    )
    return output
