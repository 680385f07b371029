"""What a layer accepts when its state is loaded."""

import warnings
from typing import Any

from torch import Tensor, nn

from tutel.experts.ffn import FFNExperts
from tutel.experts.legacy import NAMES, detect_layout, from_legacy

_COUNT = "_num_global_experts"


def prepare_state(layer: nn.Module, state: dict[str, Any], prefix: str, errors: list[str]) -> None:
    """Make a state dict fit, in place, before torch loads it.

    - A missing count of experts is accepted with a warning, a different one is an error that names both.
    - Experts of an older layout are converted with a warning.
    - A tensor with as many elements as its parameter is reshaped.
    - An expert parameter that is missing gives a warning; under ``strict=True`` torch makes it an error afterwards. (A
      hook is not told which: torch hands it ``strict=True`` always.)
    """
    experts = layer.experts
    assert isinstance(experts, nn.Module)
    _check_count(layer, state, prefix, errors)
    if isinstance(experts, FFNExperts):
        _convert_legacy(experts, state, prefix + "experts.", errors)
    for name, parameter in experts.named_parameters():
        key = f"{prefix}experts.{name}"
        value = state.get(key)
        if value is None:
            if not errors:  # else loading fails, and says why
                warnings.warn(f"the state dict has no {key!r}: the experts keep theirs", UserWarning, stacklevel=2)
        elif isinstance(value, Tensor) and value.shape != parameter.shape and value.numel() == parameter.numel():
            state[key] = value.reshape(parameter.shape)


def _check_count(layer: nn.Module, state: dict[str, Any], prefix: str, errors: list[str]) -> None:
    key, count = prefix + _COUNT, getattr(layer, _COUNT)
    if key not in state:
        message = f"the state dict does not say for how many experts it is ({key!r}): taken to be {int(count)}"
        warnings.warn(message, UserWarning, stacklevel=2)
        state[key] = count
        return
    given = state[key]
    state[key] = count
    try:
        found = int(given)
    except (TypeError, ValueError, RuntimeError):
        errors.append(f"{key!r} must be the number of experts, got {given!r}")
        return
    if found != int(count):
        errors.append(f"the state dict is for {found} experts, but the layer has {int(count)}")


def _convert_legacy(experts: FFNExperts, state: dict[str, Any], prefix: str, errors: list[str]) -> None:
    old_keys = {old_name: f"{prefix}0.{old_name}" for old_name in NAMES.values()}
    weights = {old_name: state[key] for old_name, key in old_keys.items() if key in state}
    if "fc1_weight" not in weights:
        return
    try:
        layout = detect_layout(experts, weights["fc1_weight"])
    except ValueError as error:
        errors.append(str(error))
        return
    message = f"the experts' weights ({prefix}0.*) are in the layout of {layout} and are converted"
    warnings.warn(message, UserWarning, stacklevel=2)
    for key in old_keys.values():
        state.pop(key, None)
    state.update({prefix + name: weight for name, weight in from_legacy(experts, weights, layout).items()})
