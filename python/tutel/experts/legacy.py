"""Weights of ``ffn`` experts in the layouts of older versions.

Keys are ``experts.0.{fc1_weight, fc2_weight, fc1_bias, fc2_bias}``. Up to v0.1.4 fc1_weight is [e, D, W] ([D, W] for
e = 1), W = fc1_copies * H, and in v0.1.5 it is [e, W, D]; fc2_weight is [e, H, D] and biases are [e, 1, .] or [1, .].
"""

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from tutel.experts.ffn import FFNExperts

Layout = Literal["v0.1.4", "v0.1.5"]
LAYOUTS: tuple[Layout, ...] = ("v0.1.4", "v0.1.5")

#: Names of today and of then.
NAMES = {
    "batched_fc1_w": "fc1_weight",
    "batched_fc2_w": "fc2_weight",
    "batched_fc1_bias": "fc1_bias",
    "batched_fc2_bias": "fc2_bias",
}


def check_layout(layout: object) -> Layout:
    """Check a layout's name.

    Raises:
        ValueError: If there is no such layout.
    """
    for known in LAYOUTS:
        if layout == known:
            return known
    raise ValueError(f"layout must be {' or '.join(map(repr, LAYOUTS))}, got {layout!r}")


def detect_layout(experts: FFNExperts, fc1_weight: Tensor) -> Layout:
    """Tell a layout by the shape of fc1_weight.

    Raises:
        ValueError: If the shape fits none, or both (D = fc1_copies * H): then the caller must say which.
    """
    num_experts, width, model_dim = experts.batched_fc1_w.shape
    shape = (1, *fc1_weight.shape) if fc1_weight.dim() == 2 else tuple(fc1_weight.shape)
    fits: dict[Layout, bool] = {
        "v0.1.4": shape == (num_experts, model_dim, width),
        "v0.1.5": shape == (num_experts, width, model_dim),
    }
    found = [layout for layout in LAYOUTS if fits[layout]]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(
            f"fc1_weight {list(fc1_weight.shape)} fits the layouts {' and '.join(map(repr, found))} alike: load it by "
            f"tutel.checkpoint.load_legacy_state_dict(layer, state, layout=...), which says which one it is"
        )
    raise ValueError(
        f"fc1_weight has shape {list(fc1_weight.shape)}, expected {[num_experts, model_dim, width]} (v0.1.4) or "
        f"{[num_experts, width, model_dim]} (v0.1.5)"
    )


def from_legacy(experts: FFNExperts, weights: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """Return today's tensors for tensors of an older layout, by today's and by the older names."""
    converted = {}
    for name, old_name in NAMES.items():
        parameter = getattr(experts, name)
        if old_name not in weights or parameter is None:
            continue
        weight = weights[old_name]
        if name == "batched_fc1_w" and layout == "v0.1.4":
            weight = weight.transpose(-1, -2)
        converted[name] = weight.reshape(parameter.shape) if weight.numel() == parameter.numel() else weight
    return converted


def to_legacy(experts: FFNExperts, layout: Layout) -> dict[str, Tensor]:
    """Return the experts' tensors in an older layout, by the older names."""
    one = experts.num_local_experts == 1
    converted = {}
    for name, old_name in NAMES.items():
        parameter = getattr(experts, name)
        if parameter is None:
            continue
        weight = parameter.detach()
        if name.endswith("bias"):
            weight = weight.unsqueeze(1)
        elif name == "batched_fc1_w" and layout == "v0.1.4":
            weight = weight.transpose(1, 2)
        converted[old_name] = (weight.squeeze(0) if one and layout == "v0.1.4" else weight).contiguous()
    return converted
