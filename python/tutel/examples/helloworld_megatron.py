"""Train one feed-forward network that all devices share: ``python3 -m tutel.examples.helloworld_megatron``.

There is no routing: the gate ``megatron`` lets every token pass, and each device computes its slice of the hidden
units, ``--hidden_size`` times ``--num_local_experts`` of them: as many parameters as helloworld's layer has.
"""

import argparse
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from tutel import moe as tutel_moe
from tutel import net
from tutel.examples import _shared


class ExampleModel(nn.Module):
    """A feed-forward network whose outputs are summed to one logit a token."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__()
        self._moe_layer = tutel_moe.moe_layer(
            gate_type={"type": "megatron"},
            model_dim=options.model_dim,
            experts={
                "type": "ffn",
                "hidden_size_per_expert": options.hidden_size * options.num_local_experts,
                "activation_fn": F.relu,
            },
            scan_expert_func=_shared.mark_local,
            seeds=(1, net.get_world_rank() + 1, 1),
        )

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Give log-probabilities [batch, tokens] of tokens [batch, tokens, D], and the auxiliary loss, which is 0."""
        output = self._moe_layer(tokens)
        return _shared.log_probabilities(output), output.l_aux


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program."""
    parser = _shared.argument_parser(__doc__)
    options = _shared.parse(parser, arguments)
    options.num_local_experts = _shared.whole_experts(parser, options)
    # What is computed, for the rate that is printed: every token passes all hidden units.
    options.top, options.capacity_factor = options.num_local_experts, 1.0
    _shared.run(options, ExampleModel)


if __name__ == "__main__":
    main()
