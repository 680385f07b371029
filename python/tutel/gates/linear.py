"""The gate ``top``: one linear layer."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tutel.config import LinearGateConfig
from tutel.gates.base import Gate


class LinearGate(Gate):
    """Logits are ``tokens @ wg.weight.T``."""

    def __init__(self, model_dim: int, num_experts: int, config: LinearGateConfig) -> None:
        super().__init__(config.routing, fp32=config.fp32)
        self.wg = nn.Linear(model_dim, num_experts, bias=False, dtype=torch.float32 if config.fp32 else None)

    def forward(self, tokens: Tensor) -> Tensor:
        """Give the logits [T, E] of tokens [T, D]."""
        dtype = self.compute_dtype(self.wg.weight)
        return F.linear(tokens.to(dtype), self.wg.weight.to(dtype))
