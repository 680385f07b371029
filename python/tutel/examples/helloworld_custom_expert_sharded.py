"""Divide experts of one's own among devices: ``python3 -m tutel.examples.helloworld_custom_expert_sharded``.

Each of the n devices that share an expert holds the n-th part of its hidden units. The layer's mode says which tokens
come to a device, and so whose parts it gathers: ``--parallel_type=adaptive:0`` leaves tokens where they are and brings
all experts to them; with 1, a device gets its share of an expert's tokens and gathers the whole expert; with n, it gets
all of them, computes with its own part, and the layer adds up what the n devices give.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tutel import moe as tutel_moe
from tutel import net
from tutel.examples import _shared


class ShardedExpert(nn.Module):
    """The experts of a device, or its part of one; made with the layer's sizes and the other keys of its dict."""

    def __init__(self, model_dim: int, num_experts_per_device: int, sharded_count: int, my_hidden_size: int) -> None:
        super().__init__()
        if my_hidden_size % sharded_count:
            raise ValueError(f"{sharded_count} devices cannot share {my_hidden_size} hidden units evenly")
        # Hidden units in front of the model's width: parts of several devices stand next to each other when gathered.
        shape = (num_experts_per_device, my_hidden_size // sharded_count, model_dim)
        self.first = nn.Parameter(torch.empty(shape).normal_(std=model_dim**-0.5))
        self.second = nn.Parameter(torch.empty(shape).normal_(std=my_hidden_size**-0.5))

    def forward(self, rows: Tensor, ctx: Any) -> Tensor:
        """Compute rows [experts, n, D]; a slot without a token holds zeros."""
        first, second = self.gathered(self.first, rows, ctx), self.gathered(self.second, rows, ctx)
        return torch.bmm(F.relu(torch.bmm(rows, first.transpose(1, 2))), second)

    @staticmethod
    def gathered(part: Tensor, rows: Tensor, ctx: Any) -> Tensor:
        """Give the weights [experts, hidden units, D] that rows [experts, n, D] need; differentiable."""
        devices = ctx.world_size if ctx.adaptive_degree == 0 else ctx.sharded_count // ctx.adaptive_degree
        if devices > 1:
            neighbours = net.create_groups_from_world(group_count=-devices, parent_group=ctx.group).model_group
            part = net.all_gather(part, 0, neighbours)
        return part.reshape(rows.shape[0], -1, ctx.model_dim)


class ExampleModel(nn.Module):
    """A layer whose outputs are summed to one logit a token."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__()
        self.megablocks_size = options.megablocks_size
        if options.num_local_experts is None:
            options.num_local_experts = -net.get_world_size()
        self._moe_layer = tutel_moe.moe_layer(
            gate_type={
                "type": "top",
                "k": options.top,
                "fp32_gate": options.fp32_gate,
                "capacity_factor": options.capacity_factor,
            },
            model_dim=options.model_dim,
            experts={
                "type": "custom",
                "module": ShardedExpert,
                "num_experts_per_device": options.num_local_experts,
                "my_hidden_size": options.hidden_size,
            },
            scan_expert_func=_shared.mark_local,
            seeds=(1, net.get_world_rank() + 1, 1),
            a2a_ffn_overlap_degree=options.a2a_ffn_overlap_degree,
            parallel_type=options.parallel_type,
            use_2dh=options.use_2dh,
        )

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Give log-probabilities [batch, tokens] of tokens [batch, tokens, D], and the auxiliary loss."""
        output = self._moe_layer(tokens, megablocks_size=self.megablocks_size)
        return _shared.log_probabilities(output), output.l_aux


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program."""
    parser = _shared.argument_parser(__doc__)
    _shared.add_layer_arguments(parser)
    # All devices share one expert, unless told otherwise.
    parser.set_defaults(num_local_experts=None)
    _shared.run(_shared.parse(parser, arguments), ExampleModel)


if __name__ == "__main__":
    main()
