"""Logits to the K best experts of each token and their weights."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tutel.errors import check_int, check_tensor
from tutel.functional._operators import accumulator_dtype, contiguous, fake, operators


class Selection(NamedTuple):
    """What :func:`select_experts` returns.

    Attributes:
        ids: [T, K] int32, the experts with the largest logits, in descending order; ties go to the lower id.
        weights: [T, K] in the accumulator's dtype (differentiable): their scores, normalised if asked for.
        top_scores: [T] in the accumulator's dtype: the largest score.
        score_sums: [E] in the accumulator's dtype (differentiable): scores summed over the tokens.
    """

    ids: Tensor
    weights: Tensor
    top_scores: Tensor
    score_sums: Tensor


@fake("select_experts")
def _fake(logits: Tensor, top_k: int, softmax: bool, normalize: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, experts = logits.shape
    dtype = accumulator_dtype(logits.dtype)
    return (
        logits.new_empty((tokens, top_k), dtype=torch.int32),
        logits.new_empty((tokens, top_k), dtype=dtype),
        logits.new_empty((tokens,), dtype=dtype),
        logits.new_empty((experts,), dtype=dtype),
    )


@fake("select_experts_backward")
def _fake_backward(
    logits: Tensor,
    topk_ids: Tensor,
    grad_weights: Tensor | None,
    grad_score_sums: Tensor | None,
    softmax: bool,
    normalize: bool,
) -> Tensor:
    return torch.empty_like(logits)


class _SelectExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, top_k: int, softmax: bool, normalize: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ids, weights, top_scores, score_sums = operators.select_experts(logits, top_k, softmax, normalize)
        ctx.save_for_backward(logits, ids)
        ctx.mark_non_differentiable(ids, top_scores)
        ctx.set_materialize_grads(False)
        ctx.softmax, ctx.normalize = softmax, normalize
        return ids, weights, top_scores, score_sums

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, _ids: None, grad_weights: Tensor | None, _top_scores: None, grad_score_sums: Tensor | None
    ) -> tuple[Tensor, None, None, None]:
        logits, ids = ctx.saved_tensors
        grad = operators.select_experts_backward(
            logits, ids, contiguous(grad_weights), contiguous(grad_score_sums), ctx.softmax, ctx.normalize
        )
        return grad, None, None, None


def select_experts(logits: Tensor, top_k: int, *, softmax: bool = True, normalize: bool = True) -> Selection:
    """Choose the K experts with the largest logits of each token.

    With softmax, scores are softmax(logits) over the experts, else the logits are taken as scores. With normalize and
    top_k > 1 the weights of a token are divided by max(their sum, eps(logits.dtype)). Sums are made in fp32 (fp64 for
    fp64). NaN counts as the largest logit; a token with a NaN has NaN weights and ids in range.

    Args:
        logits: [T, E], floating point.
        top_k: K, between 1 and E.
        softmax: Whether logits become scores by softmax.
        normalize: Whether weights are normalised.

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If logits are not 2-D, or top_k is not between 1 and E.
    """
    check_tensor("logits", logits, shape=(None, None))
    if not isinstance(top_k, torch.SymInt):
        check_int("top_k", top_k, at_least=1)
    if top_k > logits.shape[1]:
        raise ValueError(f"top_k must be at most the number of experts ({logits.shape[1]}), got {top_k}")
    return Selection(*_SelectExperts.apply(logits.contiguous(), top_k, softmax, normalize))
