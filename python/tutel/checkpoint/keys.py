"""Which keys of a state belong to which layer's experts."""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

COUNT = "_num_global_experts"
EXPERTS = "experts."

_NUMBERED = re.compile(r"(\d+)\.(.+)")


@dataclasses.dataclass(frozen=True)
class Layer:
    """A Mixture-of-Experts layer in a state.

    Attributes:
        prefix: What the layer's keys begin with: empty, or ending in a dot.
        num_experts: E.
    """

    prefix: str
    num_experts: int

    @property
    def title(self) -> str:
        """The layer's name in messages."""
        return f"layer {self.prefix[:-1]!r}" if self.prefix else "the layer"

    @property
    def experts(self) -> str:
        """What the keys of its experts begin with."""
        return self.prefix + EXPERTS

    def names(self, keys: Iterable[str]) -> list[str]:
        """Return the names of its experts' tensors, without what they begin with."""
        return [key[len(self.experts) :] for key in keys if key.startswith(self.experts)]

    def model_dim(self, state: Mapping[str, Any]) -> int | None:
        """Return D, which gates of the layer tell; None where they do not."""
        for name in ("wg.weight", "cosine_projector.weight"):
            value = state.get(f"{self.prefix}gates.0.{name}")
            if isinstance(value, Tensor) and value.dim() == 2:
                return value.shape[1]
        return None


def find_layers(state: Mapping[str, Any], default_num_global_experts: int | None = None) -> list[Layer]:
    """Find the layers of a state: each is known by its number of experts.

    Args:
        state: The state.
        default_num_global_experts: E of layers that do not tell it: of all that have keys with ``experts.``.

    Raises:
        ValueError: If a number of experts is none.
    """
    layers = []
    for key in state:
        prefix = key.removesuffix(COUNT)
        if prefix != key and (not prefix or prefix.endswith(".")):
            layers.append(Layer(prefix, _count(key, state[key])))
    if default_num_global_experts is not None:
        known = {layer.prefix for layer in layers}
        for key in state:
            before, found, _ = f".{key}".partition(f".{EXPERTS}")
            prefix = f"{before[1:]}." if before else ""
            if found and prefix not in known:
                known.add(prefix)
                layers.append(Layer(prefix, default_num_global_experts))
    return layers


def layer_of(key: str, layers: Iterable[Layer]) -> Layer | None:
    """Return the layer whose experts a key belongs to, the innermost of several."""
    owners = [layer for layer in layers if key.startswith(layer.experts)]
    return max(owners, key=lambda layer: len(layer.prefix), default=None)


def numbered(name: str) -> tuple[int, str] | None:
    """Return an expert's number and the rest of a name, where experts are a list of modules."""
    match = _NUMBERED.fullmatch(name)
    return (int(match[1]), match[2]) if match else None


def _count(key: str, value: Any) -> int:
    try:
        count = int(value)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{key!r} must be the number of experts, got {value!r}") from None
    if count < 1:
        raise ValueError(f"{key!r} must be the number of experts, got {count}")
    return count
