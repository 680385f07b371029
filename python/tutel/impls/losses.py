"""The auxiliary losses as the historic functions of tensors."""

import torch
from torch import Tensor

from tutel import losses
from tutel.errors import check_int, check_number, check_tensor
from tutel.functional import accumulator_dtype

__all__ = ["gshard_loss", "load_importance_loss"]

_INTEGERS = (torch.int64, torch.int32)


def gshard_loss(scores_w_noise: Tensor, top_ids: Tensor) -> Tensor:
    """Return the load-balancing loss: E times the inner product of experts' mean scores and shares of first choices.

    Args:
        scores_w_noise: [T, E], floating point (differentiable).
        top_ids: [T, K] int64 or int32, best first; -1 names no expert.

    Returns:
        0-d in the scores' dtype, in which the means are taken; sums are made in fp32 (fp64 for fp64). 0 for T = 0.

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If shapes or devices do not agree.
    """
    check_tensor("scores_w_noise", scores_w_noise, shape=(None, None))
    num_tokens, num_experts = scores_w_noise.shape
    like = ("scores_w_noise", scores_w_noise)
    check_tensor("top_ids", top_ids, shape=(num_tokens, None), dtypes=_INTEGERS, like=like)
    # Bin 0 takes those that chose nothing.
    bins = top_ids[:, 0].to(torch.int64) + 1
    first_choices = bins.new_zeros(num_experts + 1).scatter_add(0, bins, torch.ones_like(bins))[1:]
    sums = scores_w_noise.sum(0, dtype=accumulator_dtype(scores_w_noise.dtype))
    count = max(num_tokens, 1)
    mean_scores, shares = ((n / count).to(scores_w_noise.dtype) for n in (sums, first_choices.to(sums.dtype)))
    return num_experts * torch.sum(mean_scores * shares)


def load_importance_loss(
    scores_wo_noise: Tensor, topk_logits: Tensor, num_global_experts: int, gate_noise: float
) -> Tensor:
    """Return the load-importance loss (Riquelme et al., 2021, appendix A), see :mod:`tutel.losses`.

    Args:
        scores_wo_noise: [T, E], softmax of the logits without noise (differentiable).
        topk_logits: [T, K], the chosen logits with noise, best first (differentiable); the K-th is the threshold.
        num_global_experts: E.
        gate_noise: s > 0.

    Returns:
        0-d fp32. 0 for E = 1 and for T = 0.

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If a shape or number is out of range.
    """
    experts = check_int("num_global_experts", num_global_experts, at_least=1)
    check_tensor("scores_wo_noise", scores_wo_noise, shape=(None, experts))
    num_tokens = scores_wo_noise.shape[0]
    check_tensor("topk_logits", topk_logits, shape=(num_tokens, None), like=("scores_wo_noise", scores_wo_noise))
    return losses.load_importance_loss(scores_wo_noise, topk_logits[:, -1], check_number("gate_noise", gate_noise))
