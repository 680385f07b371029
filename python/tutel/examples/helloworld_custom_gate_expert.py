"""Put a gate and experts of one's own into the layer: ``python3 -m tutel.examples.helloworld_custom_gate_expert``."""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tutel import moe as tutel_moe
from tutel import net
from tutel.examples import _shared

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}


class CustomGate(nn.Module):
    """A gate gives logits; it is made with the layer's sizes and the other keys of its dict."""

    def __init__(
        self, model_dim: int, num_global_experts: int, top_k: int, capacity_factor: float, fp32_gate: bool
    ) -> None:
        super().__init__()
        # What the layer reads of a gate; all but top_k may be left out.
        self.top_k = top_k
        self.capacity_factor = capacity_factor
        self.linear = nn.Linear(model_dim, num_global_experts, bias=False, dtype=torch.float32 if fp32_gate else None)

    def forward(self, tokens: Tensor) -> Tensor:
        """Give the logits [T, E] of tokens [T, D]."""
        return self.linear(tokens.to(self.linear.weight.dtype))  # type: ignore[no-any-return]


class CustomExpert(nn.Module):
    """All experts of a device; made with the layer's sizes and the other keys of its dict."""

    def __init__(
        self, model_dim: int, num_experts_per_device: int, sharded_count: int, my_activ_type: str, my_hidden_size: int
    ) -> None:
        super().__init__()
        if sharded_count != 1:
            raise ValueError(f"these experts cannot be shared by several devices, got sharded_count={sharded_count}")
        self.activation = ACTIVATIONS[my_activ_type]
        self.first = nn.Parameter(torch.empty(num_experts_per_device, model_dim, my_hidden_size))
        self.second = nn.Parameter(torch.empty(num_experts_per_device, my_hidden_size, model_dim))
        for weight in self.parameters():
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)

    def forward(self, rows: Tensor, ctx: Any) -> Tensor:  # noqa: ARG002  (ctx shows the layer, see its documentation)
        """Compute rows [e, n, D] of each local expert; a slot without a token holds zeros."""
        return torch.bmm(self.activation(torch.bmm(rows, self.first)), self.second)


class ExampleModel(nn.Module):
    """A layer whose outputs are summed to one logit a token."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__()
        self.megablocks_size = options.megablocks_size
        self._moe_layer = tutel_moe.moe_layer(
            gate_type={
                "type": "custom",
                "module": CustomGate,
                "top_k": options.top,
                "capacity_factor": options.capacity_factor,
                "fp32_gate": options.fp32_gate,
            },
            model_dim=options.model_dim,
            experts={
                "type": "custom",
                "module": CustomExpert,
                "num_experts_per_device": options.num_local_experts,
                "my_activ_type": options.my_activ_type,
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
    parser.add_argument("--my_activ_type", choices=list(ACTIVATIONS), default="relu", help="an option of these experts")
    options = _shared.parse(parser, arguments)
    options.num_local_experts = _shared.whole_experts(parser, options)
    _shared.run(options, ExampleModel)


if __name__ == "__main__":
    main()
