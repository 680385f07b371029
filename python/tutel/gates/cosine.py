"""The gate ``cosine_top``: cosines between projected tokens and one learned vector an expert."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tutel.config import CosineGateConfig
from tutel.gates.base import Gate

#: The temperature is exp(temperature), at most 100.
_LARGEST_TEMPERATURE = math.log(100.0)


class CosineGate(Gate):
    """Logits are ``normalize(P(x)) @ normalize(S) * exp(min(temperature, log 100))`` (Chi et al., 2022, section 3.2).

    Attributes:
        temperature: [1], initially log(1 / init_t).
        cosine_projector: P, linear with bias from D to proj_dim.
        sim_matrix: S [proj_dim, E], one column an expert.
    """

    def __init__(self, model_dim: int, num_experts: int, config: CosineGateConfig) -> None:
        super().__init__(config.routing, fp32=config.fp32)
        dtype = torch.float32 if config.fp32 else None
        self.temperature = nn.Parameter(torch.log(torch.full([1], 1.0 / config.init_t, dtype=dtype)))
        self.cosine_projector = nn.Linear(model_dim, config.proj_dim, dtype=dtype)
        # Drawn and thrown away: the generator must stand where it stood for published models.
        torch.randn(config.proj_dim, num_experts, dtype=dtype)
        self.sim_matrix = nn.Parameter(torch.empty(config.proj_dim, num_experts, dtype=dtype))
        nn.init.normal_(self.sim_matrix, 0, 0.01)

    def forward(self, tokens: Tensor) -> Tensor:
        """Give the logits [T, E] of tokens [T, D]."""
        dtype = self.compute_dtype(self.sim_matrix)
        projector = self.cosine_projector
        projected = F.linear(tokens.to(dtype), projector.weight.to(dtype), projector.bias.to(dtype))
        cosines = F.normalize(projected, dim=1) @ F.normalize(self.sim_matrix.to(dtype), dim=0)
        return cosines * torch.clamp(self.temperature.to(dtype), max=_LARGEST_TEMPERATURE).exp()
