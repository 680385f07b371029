"""Gates of the user's own class."""

from torch import nn

from tutel.config import CustomGateConfig
from tutel.errors import check_int


def make_custom_gate(model_dim: int, num_experts: int, config: CustomGateConfig) -> nn.Module:
    """Make the gate as ``module(model_dim=, num_global_experts=, **options)``.

    Raises:
        TypeError: If that is no ``nn.Module`` or has no integer ``top_k``.
        ValueError: If its ``top_k`` is below 1.
    """
    gate = config.module(model_dim=model_dim, num_global_experts=num_experts, **config.options)
    name = getattr(config.module, "__name__", repr(config.module))
    if not isinstance(gate, nn.Module):
        raise TypeError(f"gate_type['module'] must make a torch.nn.Module, got {type(gate).__name__} from {name}")
    if not hasattr(gate, "top_k"):
        raise TypeError(f"the gate {name} must have an attribute `top_k`, the number of experts of a token")
    check_int(f"{name}.top_k", gate.top_k, at_least=1)
    return gate
