"""Weights of experts, gathered from the ranks that hold parts of them; for the ranks' places see dispatcher/send.py.

Parameters stay where they are, whatever the mode is: a forward pass gathers what it needs, and in the backward pass
each rank gets the sum of all ranks' gradients for its own part.
"""

from typing import Any

from torch import Tensor, nn

from tutel.distributed.collectives import all_gather
from tutel.distributed.groups import Group, divide, world_rank, world_size
from tutel.experts import OwnExperts
from tutel.experts.shards import Gather


def gathered_weights(experts: nn.Module, *, shards: int, degree: int, group: Group) -> Any:
    """Return the weights that this rank computes with.

    Args:
        experts: The experts of this rank.
        shards: n, ranks that share an expert.
        degree: r; 0 gathers the experts of all ranks.
        group: The ranks.

    Returns:
        What the experts' ``compute`` takes; None where they use their parameters themselves.
    """
    if not isinstance(experts, OwnExperts):
        return None
    own = experts.weights()
    whole = world_size(group) if degree == 0 else shards
    if own is None or whole == 1:
        return own
    parts = whole if degree == 0 else shards // degree
    leads = degree == 0 or world_rank(group) % shards < parts
    return experts.gather_weights(
        _gather(parts, group), _gather(whole, group), shards if degree == 0 else parts, leads=leads
    )


def _gather(size: int, group: Group) -> Gather:
    """Return what gathers from blocks of neighbouring ranks."""
    if size == 1:
        return lambda tensor: tensor
    neighbours = divide(size, group).neighbours

    def gather(tensor: Tensor) -> Tensor:
        return all_gather(tensor, 0, neighbours)

    return gather
