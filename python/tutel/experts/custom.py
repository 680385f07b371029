"""Experts of the user's own class."""

import inspect
import warnings

from torch import nn

from tutel.config import CustomExpertsConfig


def make_custom_experts(model_dim: int, sharded_count: int, config: CustomExpertsConfig) -> nn.Module:
    """Make the experts as ``module(model_dim=, num_experts_per_device=, sharded_count=, **options)``.

    Raises:
        TypeError: If that is no ``nn.Module``.
    """
    name = getattr(config.module, "__name__", repr(config.module))
    count = _count_name(config, name)
    counts = {count: config.num_local_experts}
    module = config.module(model_dim=model_dim, sharded_count=sharded_count, **counts, **config.options)
    if not isinstance(module, nn.Module):
        raise TypeError(f"experts['module'] must make a torch.nn.Module, got {type(module).__name__} from {name}")
    return module


def _count_name(config: CustomExpertsConfig, name: str) -> str:
    parameters = inspect.signature(config.module).parameters
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    if "num_experts_per_device" in parameters or takes_any or "local_experts" not in parameters:
        return "num_experts_per_device"
    message = f"{name} takes `local_experts`, which is deprecated: call it `num_experts_per_device`"
    warnings.warn(message, DeprecationWarning, stacklevel=4)
    return "local_experts"
