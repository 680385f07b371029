"""What all gates share."""

import torch
from torch import Tensor, nn

from tutel.config import RoutingConfig


class Gate(nn.Module):
    """A module from tokens [T, D] to logits [T, E] that carries the routing of its logits.

    The routing is read through the historic attributes ``top_k``, ``capacity_factor`` and ``gate_noise`` too.
    """

    def __init__(self, routing: RoutingConfig) -> None:
        super().__init__()
        self.routing = routing

    @property
    def top_k(self) -> int:
        """K."""
        return self.routing.top_k

    @property
    def capacity_factor(self) -> float:
        """The capacity factor f."""
        return self.routing.capacity_factor

    @property
    def gate_noise(self) -> float:
        """The scale s of the noise in training."""
        return self.routing.gate_noise

    def add_noise(self, logits: Tensor) -> Tensor:
        """Add noise to logits [T, E] in training: s / E times standard normal noise."""
        if not self.training or self.gate_noise == 0:
            return logits
        return logits + torch.randn_like(logits) * (self.gate_noise / logits.shape[1])
