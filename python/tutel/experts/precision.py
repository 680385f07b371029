"""In which dtype experts compute."""

import torch
from torch import Tensor, nn


def compute_dtype(rows: Tensor, weight: Tensor) -> torch.dtype:
    """Return the weights' dtype, or autocast's where it is on for the rows' device."""
    device = rows.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def as_parameters(rows: Tensor, module: nn.Module) -> Tensor:
    """Return rows in a user's module's dtype; under autocast the module's own operators see to that."""
    if torch.is_autocast_enabled(rows.device.type):
        return rows
    dtypes = (parameter.dtype for parameter in module.parameters() if parameter.is_floating_point())
    return rows.to(next(dtypes, rows.dtype))
