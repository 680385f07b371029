"""The gate ``top``: one linear layer."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tutel.config import RoutingConfig
from tutel.gates.base import Gate


class LinearGate(Gate):
    """Logits are ``tokens @ wg.weight.T``, in the weight's dtype, or in fp32 whatever that dtype is."""

    def __init__(self, model_dim: int, num_experts: int, routing: RoutingConfig, *, fp32: bool = False) -> None:
        super().__init__(routing)
        self.fp32 = fp32
        self.wg = nn.Linear(model_dim, num_experts, bias=False, dtype=torch.float32 if fp32 else None)

    def forward(self, tokens: Tensor) -> Tensor:
        """Give the logits [T, E] of tokens [T, D]."""
        weight = self.wg.weight
        dtype = torch.float32 if self.fp32 else weight.dtype
        return F.linear(tokens.to(dtype), weight.to(dtype))
