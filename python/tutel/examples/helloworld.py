"""Train one Mixture-of-Experts layer on random tokens: ``python3 -m tutel.examples.helloworld``."""

import argparse
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from tutel import moe as tutel_moe
from tutel import net
from tutel.examples import _shared


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    """Make the command line of this program and its variants."""
    parser = _shared.argument_parser(description)
    _shared.add_layer_arguments(parser)
    parser.add_argument("--expert_type", choices=["ffn"], default="ffn", help="kind of the experts")
    return parser


def parse_arguments(arguments: Sequence[str] | None = None, description: str | None = __doc__) -> argparse.Namespace:
    """Read the command line."""
    return _shared.parse(argument_parser(description), arguments)


class ExampleModel(nn.Module):
    """A Mixture-of-Experts layer whose outputs are summed to one logit a token.

    Args:
        options: The command line.
        group: The ranks that share the layer's experts, all of them if None.
    """

    def __init__(self, options: argparse.Namespace, group: Any = None) -> None:
        super().__init__()
        self.megablocks_size = options.megablocks_size
        self._moe_layer = tutel_moe.moe_layer(
            gate_type={
                "type": "top",
                "k": options.top,
                "fp32_gate": options.fp32_gate,
                "capacity_factor": options.capacity_factor,
            },
            model_dim=options.model_dim,
            experts={
                "type": options.expert_type,
                "count_per_node": options.num_local_experts,
                "hidden_size_per_expert": options.hidden_size,
                "activation_fn": F.relu,
            },
            scan_expert_func=_shared.mark_local,
            group=group,
            seeds=(1, net.get_world_rank(group) + 1, 1),
            a2a_ffn_overlap_degree=options.a2a_ffn_overlap_degree,
            parallel_type=options.parallel_type,
            use_2dh=options.use_2dh,
        )

    def forward(self, tokens: Tensor, **overrides: Any) -> tuple[Tensor, Tensor]:
        """Give log-probabilities [batch, tokens] of tokens [batch, tokens, D], and the auxiliary loss."""
        output = self._moe_layer(tokens, megablocks_size=self.megablocks_size, **overrides)
        return _shared.log_probabilities(output), output.l_aux


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program."""
    _shared.run(parse_arguments(arguments), ExampleModel)


if __name__ == "__main__":
    main()
