"""Build a Mixture-of-Experts layer by hand: ``python3 -m tutel.examples.helloworld_from_scratch``.

Gate, experts and auxiliary loss are this program's own; routing, dispatch, exchange and combine are tutel's.
"""

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tutel import moe as tutel_moe
from tutel import net
from tutel.examples import _shared


class ScratchGate(nn.Module):
    """Scores: the softmax of a linear layer, in float32 if asked."""

    def __init__(self, model_dim: int, num_experts: int, fp32: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(model_dim, num_experts, bias=False, dtype=torch.float32 if fp32 else None)

    def forward(self, tokens: Tensor) -> Tensor:
        """Give the scores [T, E] of tokens [T, D]."""
        return F.softmax(self.linear(tokens.to(self.linear.weight.dtype)), dim=1)


class ScratchExperts(nn.Module):
    """Two linear layers an expert, with a relu between them."""

    def __init__(self, num_experts: int, model_dim: int, hidden_size: int) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.empty(num_experts, model_dim, hidden_size))
        self.second = nn.Parameter(torch.empty(num_experts, hidden_size, model_dim))
        for name, weight in self.named_parameters():
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
            _shared.mark_local(name, weight)

    def forward(self, rows: Tensor) -> Tensor:
        """Compute rows [e, n, D] of each local expert."""
        return torch.bmm(F.relu(torch.bmm(rows, self.first)), self.second)


def balance_loss(scores: Tensor, topk_ids: Tensor) -> Tensor:
    """E times the sum over experts of mean score and share of first choices, of scores [T, E] and choices [T, K]."""
    num_experts = scores.shape[1]
    shares = F.one_hot(topk_ids[:, 0].long(), num_experts).to(scores.dtype).mean(dim=0)
    return num_experts * torch.sum(scores.mean(dim=0) * shares)


class ScratchModel(nn.Module):
    """A layer whose outputs are summed to one logit a token."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__()
        self.top_k = options.top
        self.capacity_factor = options.capacity_factor
        local_experts = options.num_local_experts
        # All ranks draw the same gate, and each its own experts.
        torch.manual_seed(1)
        self.gate = ScratchGate(options.model_dim, local_experts * net.get_world_size(), options.fp32_gate)
        torch.manual_seed(net.get_world_rank() + 1)
        self.experts = ScratchExperts(local_experts, options.model_dim, options.hidden_size)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Give log-probabilities [batch, tokens] of tokens [batch, tokens, D], and the auxiliary loss."""
        flat = tokens.flatten(0, 1)
        critical, l_aux = tutel_moe.top_k_routing(
            self.gate(flat), self.top_k, loss_fn=balance_loss, capacity_factor=self.capacity_factor
        )
        rows = tutel_moe.fast_encode(flat, critical)  # [E, C, D]: this rank's tokens, for all experts
        rows = net.all_to_all(rows, 1, 0)  # [e, W * C, D]: all ranks' tokens, for this rank's experts
        rows = self.experts(rows)
        rows = net.all_to_all(rows, 0, 1)  # [E, C, D]
        output = tutel_moe.fast_decode(rows, critical)
        return _shared.log_probabilities(output.view_as(tokens)), l_aux


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program."""
    parser = _shared.argument_parser(__doc__)
    options = _shared.parse(parser, arguments)
    options.num_local_experts = _shared.whole_experts(parser, options)
    _shared.run(options, ScratchModel)


if __name__ == "__main__":
    main()
