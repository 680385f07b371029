"""Ranks and what they say to each other: groups, collectives, gradients, the optimizer of shared parameters.

The only package that calls ``torch.distributed``. One process needs no process group and none is made for it. What
programs may use beyond the historic names of :mod:`tutel.net` is listed here.
"""

from tutel.distributed.failure import RankError
from tutel.distributed.gradients import agree_on_overflow, clip_grad_norm, ignore_experts, reduce_shared_gradients
from tutel.distributed.groups import Division, destroy_group, divide, node_size
from tutel.distributed.optimizer import DistributedOptimizer

__all__ = [
    "DistributedOptimizer",
    "Division",
    "RankError",
    "agree_on_overflow",
    "clip_grad_norm",
    "destroy_group",
    "divide",
    "ignore_experts",
    "node_size",
    "reduce_shared_gradients",
]
