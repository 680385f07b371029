"""Which of the kernels' activations a user's callable is."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

_FUNCTIONS: Mapping[Any, str] = {
    F.relu: "relu",
    torch.relu: "relu",
    F.silu: "silu",
    F.gelu: "gelu",
    torch.sigmoid: "sigmoid",
    F.sigmoid: "sigmoid",
}
_MODULES: Mapping[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.SiLU: "silu",
    nn.Sigmoid: "sigmoid",
    nn.Identity: "identity",
}
_GELU = {"none": "gelu", "tanh": "gelu_tanh"}


def known_activation(activation: Callable[..., Any]) -> str | None:
    """Return the kernels' name of a callable that is one of torch's own functions or modules, or None.

    None is returned wherever something else may happen in a call: for a module's subclass, a module with hooks, a
    function around a function.
    """
    if isinstance(activation, functools.partial):
        plain = activation.func is F.gelu and not activation.args and set(activation.keywords) == {"approximate"}
        return _GELU.get(activation.keywords["approximate"]) if plain else None
    if isinstance(activation, nn.Module):
        if any(getattr(activation, hooks) for hooks in _HOOKS):
            return None
        if type(activation) is nn.GELU:
            return _GELU.get(activation.approximate)
        return _MODULES.get(type(activation))
    try:
        return _FUNCTIONS.get(activation)
    except TypeError:  # not hashable
        return None


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
