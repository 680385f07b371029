"""Auxiliary losses of the routing."""

import torch
from torch import Tensor

from tutel.route import RoutePlan


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
    shares = (plan.first_choices / num_tokens).to(dtype)
    return plan.num_experts * torch.sum(mean_scores * shares)
