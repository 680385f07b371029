"""Auxiliary losses of the routing."""

import torch
from torch import Tensor

from tutel.route import RoutePlan


def auxiliary_loss(plan: RoutePlan, clean_logits: Tensor, logits: Tensor, gate_noise: float, *, gshard: bool) -> Tensor:
    """Return the loss that a layer has asked for.

    Args:
        plan: A plan made from logits.
        clean_logits: [T, E] without noise.
        logits: [T, E] with noise.
        gate_noise: s.
        gshard: GShard's, or else the load-importance loss.
    """
    if gshard:
        return gshard_loss(plan, logits.dtype)
    thresholds = logits.gather(1, plan.topk_ids[:, -1:].long()).squeeze(1)
    return load_importance_loss(torch.softmax(clean_logits.float(), dim=1), thresholds, gate_noise)


def gshard_loss(plan: RoutePlan, dtype: torch.dtype) -> Tensor:
    """Return the load-balancing loss of GShard (Lepikhin et al., 2020, algorithm 1), 0-d, differentiable in the scores.

    ``E / T^2 * sum_e (sum_t scores[t, e] * number of first choices of e)``, that is E times the inner product of each
    expert's mean score and its share of first choices. 0 for T = 0.

    Args:
        plan: A plan made from scores.
        dtype: Of the result; the means are taken in it.
    """
    if plan.score_sums is None:
        raise ValueError("plan has no scores: this loss needs a plan made by tutel.route.route")
    num_tokens = max(plan.topk_ids.shape[0], 1)
    mean_scores = (plan.score_sums / num_tokens).to(dtype)
    shares = (plan.first_choices.to(plan.score_sums.dtype) / num_tokens).to(dtype)
    return plan.num_experts * torch.sum(mean_scores * shares)


def load_importance_loss(scores: Tensor, thresholds: Tensor, gate_noise: float) -> Tensor:
    """Return the load-importance loss (Riquelme et al., 2021, appendix A), 0-d fp32, differentiable in both tensors.

    (cv2(importance) + cv2(load)) / 2 with cv2 = unbiased variance / (mean^2 + 1e-10), importance_e = sum_t p[t, e],
    load_e = sum_t Phi((p[t, e] - theta_t) / (gate_noise / E)). 0 for E = 1 and for T = 0.

    Args:
        scores: p [T, E], softmax of the logits without noise.
        thresholds: theta [T], the K-th chosen logit of each token, with noise.
        gate_noise: s > 0.

    Raises:
        ValueError: If gate_noise is not positive.
    """
    if gate_noise <= 0:
        raise ValueError(f"the load-importance loss (is_gshard_loss=False) needs gate_noise > 0, got {gate_noise}")
    scores = scores.float()
    num_tokens, num_experts = scores.shape
    if num_experts == 1 or num_tokens == 0:
        return scores.sum() * 0.0
    margins = (scores - thresholds.float().unsqueeze(1)) * (num_experts / gate_noise)
    load = torch.special.ndtr(margins).sum(0)
    return (_squared_variation(scores.sum(0)) + _squared_variation(load)) / 2


def _squared_variation(values: Tensor) -> Tensor:
    return values.var() / (values.mean() ** 2 + 1e-10)
