"""Two-layer experts, plain or gated, with everything around their products in the same passes.

plain:  y = act(x W1 + b1) W2 + b2
gated:  y = (act(x W1 + b1) * (x V)) W2 + b2

Nothing of size [R, D] is made before W2, and what the gradient needs is x, act's argument and x V: hidden units are
computed again. With g the gradient of a token's output and w the weight of a choice, G = g W2^T gives all others: the
choice's weight has the gradient G . hidden + g . b2, and W2's gradient is (w hidden)^T g (as in ScatterMoE, Tan et al.,
2024, and SonicMoE, Guo et al., 2025), so no expert's output is saved or weighted again.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tutel import _core
from tutel.errors import check_tensor, one_of
from tutel.functional._operators import accumulator_dtype, contiguous, fake, operators

#: Names of the activations that the operators know.
ACTIVATIONS = tuple(_core.activations())


class Routes(NamedTuple):
    """Which tokens the rows are copies of, and how rows are added up again.

    Attributes:
        topk_ids: [T, K] int32.
        weights: [T, K] in the accumulator's dtype (differentiable).
        row_index: [T, K] int64, row of each choice, -1 where it is dropped.
        row_choice: [R] int64, its inverse.
    """

    topk_ids: Tensor
    weights: Tensor
    row_index: Tensor
    row_choice: Tensor


@fake("expert_hidden")
def _fake_hidden(
    rows: Tensor,
    row_choice: Tensor | None,
    top_k: int,
    weight: Tensor,
    bias: Tensor | None,
    value_weight: Tensor | None,
    offsets: Tensor,
    transposed: bool,
    activation: int,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    num_rows = rows.shape[0] if row_choice is None else row_choice.shape[0]
    sizes, nothing = (num_rows, weight.shape[1 if transposed else 2]), (0, 0)
    pre = rows.new_empty(sizes if save else nothing)
    return rows.new_empty(sizes), pre, rows.new_empty(sizes if save and value_weight is not None else nothing)


@fake("expert_hidden_grad")
def _fake_hidden_grad(
    grad: Tensor,
    row_choice: Tensor | None,
    weights: Tensor | None,
    weight: Tensor,
    transposed: bool,
    offsets: Tensor,
    activation: int,
    pre: Tensor,
    value: Tensor | None,
    hidden: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    nothing = (0, 0)
    return (
        torch.empty_like(pre),
        pre.new_empty(nothing if value is None else pre.shape),
        pre.new_empty(pre.shape if hidden else nothing),
        pre.new_empty(nothing if weights is None else weights.shape, dtype=accumulator_dtype(pre.dtype)),
    )


_DIFFERENTIABLE = ("tokens", "weights", "fc1", "fc1_bias", "value", "fc2", "fc2_bias")


class _ExpertFFN(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,
        weights: Tensor | None,
        fc1: Tensor,
        fc1_bias: Tensor | None,
        value_weight: Tensor | None,
        fc2: Tensor,
        fc2_bias: Tensor | None,
        offsets: Tensor,
        routes: tuple[Tensor, Tensor, Tensor] | None,
        transposed: bool,
        activation: int,
    ) -> Tensor:
        topk_ids, row_index, row_choice = (None, None, None) if routes is None else routes
        save = any(ctx.needs_input_grad)
        hidden, pre, value = operators.expert_hidden(
            tokens,
            row_choice,
            1 if row_index is None else row_index.shape[1],
            fc1,
            fc1_bias,
            value_weight,
            offsets,
            transposed,
            activation,
            save,
        )
        rows: Tensor = operators.grouped_gemm(hidden, fc2, fc2_bias, offsets, False)
        ctx.transposed, ctx.activation = transposed, activation
        if save:
            value = None if value_weight is None else value
            ctx.save_for_backward(
                tokens, weights, fc1, value_weight, fc2, fc2_bias, offsets, topk_ids, row_index, row_choice, pre, value
            )
        if routes is None:
            return rows
        output: Tensor = operators.combine(rows, row_index, weights)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (tokens, weights, fc1, value_weight, fc2, fc2_bias, offsets, topk_ids, row_index, row_choice, pre, value) = (
            ctx.saved_tensors
        )
        transposed = ctx.transposed
        needs = dict(
            zip(
                ("tokens", "weights", "fc1", "fc1_bias", "value", "fc2", "fc2_bias"), ctx.needs_input_grad, strict=False
            )
        )
        grad = grad.contiguous()
        grad_pre, grad_value, hidden, grad_weights = operators.expert_hidden_grad(
            grad, row_choice, weights, fc2, False, offsets, ctx.activation, pre, value, needs["fc2"]
        )
        top_k = 1 if weights is None else weights.shape[1]

        def matrix_grad(of_hidden: Tensor) -> Tensor:
            """Return tokens^T of_hidden, in the layout of fc1."""
            if transposed:
                in_place: Tensor = operators.grouped_gemm_weight_grad(
                    of_hidden, tokens, offsets, None, row_choice, top_k
                )
                return in_place
            result: Tensor = operators.grouped_gemm_weight_grad(tokens, of_hidden, offsets, row_choice, None, top_k)
            return result

        grads: dict[str, Tensor | None] = {}
        if needs["fc2"]:
            grads["fc2"] = operators.grouped_gemm_weight_grad(hidden, grad, offsets, None, row_choice, top_k)
        del hidden
        if needs["fc2_bias"]:
            rows = grad if row_choice is None else operators.dispatch(grad, row_choice, weights, top_k)
            grads["fc2_bias"] = operators.grouped_sum(rows, offsets)
            del rows
        if needs["weights"]:
            if fc2_bias is not None:
                kept = torch.where(row_index >= 0, topk_ids.long(), -1)
                grad_weights = grad_weights + operators.row_dot(fc2_bias, kept, grad)
            grads["weights"] = grad_weights
        if needs["fc1"]:
            grads["fc1"] = matrix_grad(grad_pre)
        if needs["fc1_bias"]:
            grads["fc1_bias"] = operators.grouped_sum(grad_pre, offsets)
        if needs["value"]:
            grads["value"] = matrix_grad(grad_value)
        if needs["tokens"]:
            if value_weight is None:
                rows = operators.grouped_gemm(grad_pre, fc1, None, offsets, not transposed)
            else:
                rows = operators.grouped_gemm_pair(grad_pre, fc1, grad_value, value_weight, offsets, not transposed)
            grads["tokens"] = rows if row_index is None else operators.combine(rows, row_index, None)
        return (*(grads.get(name) for name in needs), None, None, None, None)


def expert_ffn(
    tokens: Tensor,
    fc1: Tensor,
    fc2: Tensor,
    offsets: Tensor,
    *,
    activation: str,
    value: Tensor | None = None,
    fc1_bias: Tensor | None = None,
    fc2_bias: Tensor | None = None,
    transposed: bool = False,
    routes: Routes | None = None,
) -> Tensor:
    """Compute every expert's rows; with routes, from tokens and to tokens.

    Args:
        tokens: [T, D] with routes, else rows [R, D], expert by expert; floating point (differentiable).
        fc1: [E, D, H], or [E, H, D] when transposed, in the dtype of tokens (differentiable).
        fc2: [E, H, N] (differentiable).
        offsets: [E + 1] int64: expert e owns rows ``offsets[e]`` up to ``offsets[e + 1]``.
        activation: One of :data:`ACTIVATIONS`.
        value: V of gated experts, in the shape of fc1 (differentiable).
        fc1_bias: [E, H] (differentiable).
        fc2_bias: [E, N] (differentiable).
        transposed: The layout of fc1 and value. Neither layout is copied.
        routes: Where rows come from and go to.

    Returns:
        With routes [T, N], the weighted sums over each token's choices; else [R, N], zero behind ``offsets[E]``.

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If shapes or devices do not agree, or the activation is unknown.
        RuntimeError: If offsets do not ascend from 0 within the rows, or a row's choice is out of range.
    """
    check_tensor("tokens", tokens, shape=(None, None))
    like = ("tokens", tokens)
    width = tokens.shape[1]
    check = partial(check_tensor, dtypes=[tokens.dtype], like=like)
    check("fc1", fc1, shape=(None, None, width) if transposed else (None, width, None))
    experts, hidden = fc1.shape[0], fc1.shape[1 if transposed else 2]
    check("fc2", fc2, shape=(experts, hidden, None))
    check_tensor("offsets", offsets, shape=(experts + 1,), dtypes=[torch.int64], like=like)
    if value is not None:
        check("value", value, shape=tuple(fc1.shape))
    if fc1_bias is not None:
        check("fc1_bias", fc1_bias, shape=(experts, hidden))
    if fc2_bias is not None:
        check("fc2_bias", fc2_bias, shape=(experts, fc2.shape[2]))
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be {one_of(map(repr, ACTIVATIONS))}, got {activation!r}")
    weights = indices = None
    if routes is not None:
        check_tensor(
            "routes.row_index", routes.row_index, shape=(tokens.shape[0], None), dtypes=[torch.int64], like=like
        )
        choices = tuple(routes.row_index.shape)
        check_tensor("routes.topk_ids", routes.topk_ids, shape=choices, dtypes=[torch.int32], like=like)
        check_tensor("routes.row_choice", routes.row_choice, shape=(None,), dtypes=[torch.int64], like=like)
        dtype = accumulator_dtype(tokens.dtype)
        check_tensor("routes.weights", routes.weights, shape=choices, dtypes=[dtype], like=like)
        weights = routes.weights.contiguous()
        indices = (routes.topk_ids.contiguous(), routes.row_index.contiguous(), routes.row_choice.contiguous())
    output: Tensor = _ExpertFFN.apply(
        tokens.contiguous(),
        weights,
        fc1.contiguous(),
        contiguous(fc1_bias),
        contiguous(value),
        fc2.contiguous(),
        contiguous(fc2_bias),
        offsets.contiguous(),
        indices,
        transposed,
        ACTIVATIONS.index(activation),
    )
    return output
