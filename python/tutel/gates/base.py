"""What all gates share."""

import torch
from torch import Tensor, nn

from tutel.config import RoutingConfig


class Gate(nn.Module):
    """A module from tokens [T, D] to logits [T, E].

    Attributes:
        top_k: K of the layer's routing; like the others it may be changed between forwards.
        capacity_factor: The capacity factor f.
        gate_noise: The scale s of the noise in training.
    """

    def __init__(self, routing: RoutingConfig, *, fp32: bool) -> None:
        super().__init__()
        self.top_k = routing.top_k
        self.capacity_factor = routing.capacity_factor
        self.gate_noise = routing.gate_noise
        self.fp32 = fp32

    def compute_dtype(self, weight: Tensor) -> torch.dtype:
        """Return the dtype of the logits: the weight's, or fp32 whatever that is."""
        return torch.float32 if self.fp32 else weight.dtype


def gate_logits(gate: nn.Module, tokens: Tensor, num_experts: int) -> Tensor:
    """Call a gate, one's own or a user's, outside autocast, on tokens in its parameters' dtype.

    Raises:
        TypeError: If it does not return a floating-point tensor.
        ValueError: If that is not [T, E].
    """
    if not isinstance(gate, Gate):
        dtypes = (parameter.dtype for parameter in gate.parameters() if parameter.is_floating_point())
        tokens = tokens.to(next(dtypes, tokens.dtype))
    with torch.autocast(tokens.device.type, enabled=False):
        logits = gate(tokens)
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        found = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
        raise TypeError(f"the gate {type(gate).__name__} must return a floating-point torch.Tensor, got {found}")
    if logits.dim() != 2 or logits.shape[0] != tokens.shape[0] or logits.shape[1] != num_experts:
        raise ValueError(
            f"the gate {type(gate).__name__} must return logits [T, E] = [{tokens.shape[0]}, {num_experts}], "
            f"got shape {list(logits.shape)}"
        )
    return logits


def add_noise(logits: Tensor, scale: float) -> Tensor:
    """Add standard normal noise times ``scale / E`` to logits [T, E]."""
    return logits + torch.randn_like(logits) * (scale / logits.shape[1])
