"""The degree of model parallelism that ``parallel_type='auto'`` takes: the one with the least modelled time."""

import torch
from torch import Tensor, nn

from tutel.config import ExchangeConfig, RoutingConfig
from tutel.distributed.cost import Sizes, choose_degree
from tutel.distributed.groups import Group, world_size
from tutel.distributed.handshake import GroupSync
from tutel.distributed.links import measured_links

#: Bytes of an element of what rows are narrowed to.
_WIRE_SIZES = {"bfloat16": 2.0, "float8_e4m3": 1.0}


def automatic_degree(
    experts: nn.Module,
    tokens: Tensor,
    routing: RoutingConfig,
    *,
    num_experts: int,
    valid_degrees: list[int],
    chunks: int,
    exchange: ExchangeConfig,
    group: Group,
) -> int:
    """Choose for the rank that has the most tokens; all ranks of the group call this and choose the same.

    Args:
        experts: The experts of this rank. What their parameters hold counts, as if it were an expert of two layers.
        tokens: [T, D].
        routing: Choices a token and capacity.
        num_experts: E.
        valid_degrees: What to choose from.
        chunks: Chunks that overlap.
        exchange: How rows travel.
        group: The ranks.
    """
    ranks, width = world_size(group), tokens.shape[1]
    output_dim = int(getattr(experts, "output_dim", width))
    elements = sum(parameter.numel() for parameter in experts.parameters()) * ranks // num_experts
    sizes = Sizes(
        tokens=GroupSync(group, tokens.device).max(tokens.shape[0]),
        model_dim=width,
        hidden=max(1, round(elements / (width + output_dim))),
        output_dim=output_dim,
        num_experts=num_experts,
        top_k=routing.top_k,
        world_size=ranks,
        element_size=tokens.element_size(),
        capacity_factor=routing.capacity_factor,
        biases=False,
        wire_size=_WIRE_SIZES.get(exchange.wire_dtype or ""),
    )
    return choose_degree(
        sizes,
        measured_links(group),
        valid_degrees,
        torch.is_grad_enabled(),
        overlap_degree=chunks,
        hierarchical=exchange.hierarchical,
    )
