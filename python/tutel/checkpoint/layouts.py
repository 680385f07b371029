"""States of layers in the layouts of older versions, in both directions."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tutel.experts import FFNExperts
from tutel.experts.legacy import NAMES, check_layout, from_legacy, to_legacy
from tutel.layer import MOELayer

__all__ = ["legacy_state_dict", "load_legacy_state_dict"]

_PREFIX = "experts.0."


def load_legacy_state_dict(layer: MOELayer, state: Mapping[str, Any], *, layout: str, strict: bool = True) -> None:
    """Load a layer's state whose experts are in a known older layout, 'v0.1.4' (and before) or 'v0.1.5'.

    ``layer.load_state_dict`` converts older layouts too, but shapes cannot tell them apart where D = fc1_copies * H.

    Raises:
        TypeError: If the layer's experts are not ``ffn``.
        ValueError: If there is no such layout.
        RuntimeError: If keys or sizes do not fit.
    """
    experts = _ffn(layer)
    known = check_layout(layout)
    old = {name: state[_PREFIX + name] for name in NAMES.values() if _PREFIX + name in state}
    rest = {key: value for key, value in state.items() if not key.startswith(_PREFIX)}
    converted = from_legacy(experts, old, known)
    layer.load_state_dict({**rest, **{f"experts.{name}": value for name, value in converted.items()}}, strict=strict)


def legacy_state_dict(layer: MOELayer, *, layout: str) -> dict[str, Tensor]:
    """Return a layer's state with its experts in an older layout, 'v0.1.4' or 'v0.1.5'.

    Raises:
        TypeError: If the layer's experts are not ``ffn``.
        ValueError: If there is no such layout.
    """
    converted = to_legacy(_ffn(layer), check_layout(layout))
    rest = {key: value for key, value in layer.state_dict().items() if not key.startswith("experts.")}
    return {**rest, **{_PREFIX + name: value for name, value in converted.items()}}


def _ffn(layer: MOELayer) -> FFNExperts:
    if not isinstance(layer.experts, FFNExperts):
        raise TypeError(f"older layouts exist for experts of type 'ffn' only, got {type(layer.experts).__name__}")
    return layer.experts
