"""The layouts that a layer's experts may have in files, and older ones made into today's.

The older layouts are those of ``tutel.experts.legacy``, here without a layer to compare with.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

from torch import Tensor

from tutel.checkpoint.errors import CheckpointError
from tutel.checkpoint.keys import Layer, numbered
from tutel.errors import check_choice
from tutel.experts.legacy import LAYOUTS, NAMES

#: 'batched' are tensors [e, ...], 'modules' one module an expert with its number in the keys. 'megatron' are the parts
#: of one expert, in layers without gates: each rank counts as an expert and has a bias of its own, which are added.
FileLayout = Literal["batched", "modules", "megatron", "v0.1.4", "v0.1.5"]
FILE_LAYOUTS: tuple[FileLayout, ...] = ("batched", "modules", "megatron", *LAYOUTS)

_OLD_NAMES = {f"0.{old}": name for name, old in NAMES.items()}
#: The first weights of experts ``ffn``, the only ones that the gate ``megatron`` goes with.
_FFN: dict[FileLayout, str] = {"batched": "batched_fc1_w", **dict.fromkeys(LAYOUTS, "0.fc1_weight")}


def check_file_layout(layout: object) -> FileLayout | None:
    """Check a layout's name.

    Raises:
        ValueError: If there is no such layout.
    """
    return check_choice("layout", layout, (None, *FILE_LAYOUTS))


def layout_of(
    layer: Layer, state: Mapping[str, Any], given: FileLayout | None, num_local_experts: int, *, maybe_parts: bool
) -> FileLayout:
    """Return a layer's layout: what the caller says, if that can be, or what names and shapes tell.

    Args:
        layer: The layer.
        state: Of a rank, or whole.
        given: What the caller says.
        num_local_experts: Experts in this state.
        maybe_parts: Whether the number of ranks allows that each has a part of one expert, as with 'megatron'.

    Raises:
        CheckpointError: If they fit several.
    """
    has_gates = any(key.startswith(f"{layer.prefix}gates.") for key in state)
    if given is not None and not (given == "megatron" and has_gates):
        return given
    found = detect_layout(layer, state, num_local_experts)
    if maybe_parts and not has_gates and _FFN.get(found) in layer.names(state):
        raise CheckpointError(
            f"{layer.title} has no gate in the state: its ranks may have experts of their own, or parts of one as with "
            f"the gate 'megatron'; say which by layout (--layout): {found!r} or 'megatron'"
        )
    return found


def detect_layout(layer: Layer, state: Mapping[str, Any], num_local_experts: int) -> FileLayout:
    """Tell a layer's layout by names and shapes.

    Raises:
        CheckpointError: If they fit several.
    """
    names = layer.names(state)
    numbers = {None if (found := numbered(name)) is None else found[0] for name in names}
    if {"0.fc1_weight", "0.fc2_weight"} <= set(names) <= set(_OLD_NAMES):
        return _older_layout(layer, state)
    if numbers != set(range(num_local_experts)):
        return "batched"
    tensors = [value for name in names if isinstance(value := state[layer.experts + name], Tensor)]
    if all(tensor.dim() > 1 and tensor.shape[0] == num_local_experts for tensor in tensors):
        raise CheckpointError(
            f"the experts of {layer.title} may be a list of modules or tensors of all {num_local_experts}: say "
            f"which by layout 'modules' or 'batched'"
        )
    return "modules"


def _older_layout(layer: Layer, state: Mapping[str, Any]) -> FileLayout:
    fc1, fc2 = (state[f"{layer.experts}0.{name}_weight"] for name in ("fc1", "fc2"))
    if not all(isinstance(weight, Tensor) and weight.dim() in (2, 3) for weight in (fc1, fc2)):
        return "modules"
    hidden, model_dim = fc2.shape[-2:]
    fits: dict[FileLayout, bool] = {
        "v0.1.4": fc1.shape[-2] == model_dim and fc1.shape[-1] % hidden == 0,
        "v0.1.5": fc1.shape[-1] == model_dim and fc1.shape[-2] % hidden == 0,
    }
    found = [layout for layout, fit in fits.items() if fit]
    if len(found) == 1:
        warnings.warn(f"the experts of {layer.title} are in the layout of {found[0]}", UserWarning, stacklevel=2)
        return found[0]
    shapes = f"fc1_weight {list(fc1.shape)} and fc2_weight {list(fc2.shape)}"
    fit = "both 'v0.1.4' and 'v0.1.5'" if found else "neither 'v0.1.4' nor 'v0.1.5'"
    raise CheckpointError(
        f"the experts of {layer.title} look like those of an older version, whose layout the shapes do not tell: "
        f"{shapes} fit {fit}; say which by layout, or 'modules' if they are a list of modules"
    )


class Renamed(Mapping[str, Any]):
    """A state under other names; values are read, and converted, when they are asked for."""

    def __init__(self, state: Mapping[str, Any], names: Mapping[str, str], convert: Callable[[str, Any], Any]) -> None:
        """Make it.

        Args:
            state: The state.
            names: From its keys to the new ones, for those that change.
            convert: Called as f(new key, value) for these.
        """
        self._state = state
        self._old = {names.get(key, key): key for key in state}
        self._convert = convert

    def __getitem__(self, key: str) -> Any:
        old = self._old[key]
        value = self._state[old]
        return value if old == key else self._convert(key, value)

    def __iter__(self) -> Iterator[str]:
        return iter(self._old)

    def __len__(self) -> int:
        return len(self._old)


def modern(state: Mapping[str, Any], layouts: Mapping[Layer, FileLayout]) -> Mapping[str, Any]:
    """Return a state, of one rank or whole, with older layouts of experts in today's: tensors [e, ...]."""
    renamed = {
        layer.experts + old: (layer.experts + name, layout)
        for layer, layout in layouts.items()
        if layout in LAYOUTS
        for old, name in _OLD_NAMES.items()
    }
    layout_by_key = dict(renamed.values())

    def convert(key: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dim() < 2:
            return value
        name = key.rsplit(".", 1)[1]
        if name.endswith("bias"):  # [e, 1, .], or [1, .] of one expert
            return value.reshape(-1, value.shape[-1])
        value = value.unsqueeze(0) if value.dim() == 2 else value
        return value.transpose(1, 2) if name == "batched_fc1_w" and layout_by_key[key] == "v0.1.4" else value

    return Renamed(state, {old: new for old, (new, _) in renamed.items()}, convert) if renamed else state
