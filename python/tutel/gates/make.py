"""From options to modules."""

from torch import nn

from tutel.config import CosineGateConfig, CustomGateConfig, LinearGateConfig
from tutel.gates.cosine import CosineGate
from tutel.gates.custom import make_custom_gate
from tutel.gates.linear import LinearGate


def make_gate(
    model_dim: int, num_experts: int, config: LinearGateConfig | CosineGateConfig | CustomGateConfig
) -> nn.Module:
    """Make one gate."""
    if isinstance(config, LinearGateConfig):
        return LinearGate(model_dim, num_experts, config)
    if isinstance(config, CosineGateConfig):
        return CosineGate(model_dim, num_experts, config)
    return make_custom_gate(model_dim, num_experts, config)
