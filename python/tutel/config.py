"""Options of the layer, checked once and immutable; the historic dict options translate onto them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tutel import env
from tutel.errors import check_bool, check_int, check_keys, check_number

Activation = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class RoutingConfig:
    """How logits become a :class:`tutel.route.RoutePlan`.

    Attributes:
        top_k: Experts a token, at least 1; a layer limits it to its number of experts.
        capacity_factor: f in the capacity C of an expert, see :func:`tutel.route.drop_threshold`.
        normalize: Divide the weights of a token by their sum (for top_k > 1 only).
        prioritized: Serve tokens in descending order of their largest score, instead of in their own order.
        gate_noise: s, in training: s / num_experts times standard normal noise is added to the logits.
    """

    top_k: int = 1
    capacity_factor: float = 1.0
    normalize: bool = True
    prioritized: bool = False
    gate_noise: float = 0.0

    def __post_init__(self) -> None:
        check_int("top_k", self.top_k, at_least=1)
        check_number("capacity_factor", self.capacity_factor)
        check_number("gate_noise", self.gate_noise, at_least=0.0)


@dataclass(frozen=True)
class GateConfig:
    """One gate: its kind, its own options, and the routing of its logits."""

    kind: str
    routing: RoutingConfig
    fp32: bool = False


@dataclass(frozen=True)
class FFNConfig:
    """Experts of kind ``ffn``: y = act(x W1 + b1) W2 + b2.

    Attributes:
        num_local_experts: Experts of this rank.
        hidden_size: H.
        activation: act, called on [R, H].
        fc1_bias: Whether there is b1.
        fc2_bias: Whether there is b2.
        output_dim: Width of y; None means the width of x.
    """

    num_local_experts: int
    hidden_size: int
    activation: Activation = field(default=torch.nn.functional.relu)
    fc1_bias: bool = True
    fc2_bias: bool = True
    output_dim: int | None = None


def check_dict(name: str, options: object) -> Mapping[str, Any]:
    """Check that options are a dict with string keys.

    Raises:
        TypeError: If they are not.
    """
    if not isinstance(options, Mapping) or not all(isinstance(key, str) for key in options):
        raise TypeError(f"{name} must be a dict with string keys, got {options!r}")
    return options


_TOP_OPTIONS = {"type", "k", "capacity_factor", "fp32_gate", "gate_noise", "batch_prioritized_routing"}


def gate_configs(options: object, *, normalize: bool, prioritized: bool) -> list[GateConfig]:
    """Translate ``gate_type``: one gate's dict, or a list of them.

    Raises:
        TypeError: If an option has the wrong type.
        ValueError: If an option is unknown or out of range, or there is no gate.
    """
    if not isinstance(options, list | tuple):
        return [_gate_config(options, "gate_type", normalize, prioritized)]
    if not options:
        raise ValueError("gate_type must hold at least one gate, got an empty list")
    return [_gate_config(gate, f"gate_type[{index}]", normalize, prioritized) for index, gate in enumerate(options)]


def _gate_config(options: object, name: str, normalize: bool, prioritized: bool) -> GateConfig:
    given = check_dict(name, options)
    kind = given.get("type", "top")
    if kind != "top":
        raise ValueError(f"{name}['type'] must be 'top', got {kind!r}")
    check_keys(name, given, _TOP_OPTIONS)
    top_k = check_int(f"{name}['k']", given.get("k", 1))
    if top_k == 0:
        raise ValueError(f"{name}['k'] must not be 0")
    routing = RoutingConfig(
        # The README's negative k means one expert a token; see resolve_expert_count for what else it means.
        top_k=max(top_k, 1),
        capacity_factor=check_number(f"{name}['capacity_factor']", given.get("capacity_factor", env.capacity_factor())),
        normalize=normalize,
        prioritized=check_bool(
            f"{name}['batch_prioritized_routing']", given.get("batch_prioritized_routing", prioritized)
        ),
        gate_noise=check_number(f"{name}['gate_noise']", given.get("gate_noise", 0.0), at_least=0.0),
    )
    return GateConfig("top", routing, check_bool(f"{name}['fp32_gate']", given.get("fp32_gate", False)))


_FFN_OPTIONS = {
    "type",
    "count_per_node",
    "num_experts_per_device",
    "hidden_size_per_expert",
    "activation_fn",
    "has_fc1_bias",
    "has_fc2_bias",
    "output_dim",
}


def ffn_config(options: object, *, num_local_experts: int) -> FFNConfig:
    """Translate the experts' dict.

    Raises:
        TypeError: If an option has the wrong type.
        ValueError: If an option is missing, unknown or out of range.
    """
    given = check_dict("experts", options)
    kind = given.get("type", "ffn")
    if kind != "ffn":
        raise ValueError(f"experts['type'] must be 'ffn', got {kind!r}")
    check_keys("experts", given, _FFN_OPTIONS)
    if "hidden_size_per_expert" not in given:
        raise ValueError("experts must have 'hidden_size_per_expert'")
    hidden_size = check_int("experts['hidden_size_per_expert']", given["hidden_size_per_expert"], at_least=1)
    activation = given.get("activation_fn")
    if activation is not None and not callable(activation):
        raise TypeError(f"experts['activation_fn'] must be callable or None, got {activation!r}")
    output_dim = given.get("output_dim")
    return FFNConfig(
        num_local_experts=num_local_experts,
        hidden_size=hidden_size,
        activation=torch.nn.functional.relu if activation is None else activation,
        fc1_bias=check_bool("experts['has_fc1_bias']", given.get("has_fc1_bias", True)),
        fc2_bias=check_bool("experts['has_fc2_bias']", given.get("has_fc2_bias", True)),
        output_dim=None if output_dim is None else check_int("experts['output_dim']", output_dim, at_least=1),
    )


def resolve_expert_count(gate_type: object, experts: object, *, world_size: int) -> tuple[int, int]:
    """Return (experts a rank holds, ranks that share an expert); one of the two is 1.

    count_per_node = n gives (n, 1); -n or 1 / n gives (1, n), and so does a negative k of a gate, as the README says.

    Raises:
        TypeError: If a count is no number.
        ValueError: If counts contradict each other, or n ranks share an expert but do not divide the group.
    """
    given = check_dict("experts", experts)
    counts = {f"experts[{key!r}]": given[key] for key in ("count_per_node", "num_experts_per_device") if key in given}
    for index, gate in enumerate(gate_type if isinstance(gate_type, list | tuple) else [gate_type]):
        top_k = gate.get("k", 1) if isinstance(gate, Mapping) else 1
        if check_int("gate_type's k", top_k) < 0:
            counts[f"gate_type[{index}]['k']"] = top_k
    resolved = {name: _experts_and_shards(name, count) for name, count in counts.items()}
    if len(set(resolved.values())) > 1:
        given_counts = ", ".join(f"{name}={count!r}" for name, count in counts.items())
        raise ValueError(f"the number of experts a device holds is given several times and differs: {given_counts}")
    num_local_experts, shards = next(iter(resolved.values()), (1, 1))
    if world_size % shards != 0:
        raise ValueError(
            f"{next(iter(counts))}={next(iter(counts.values()))!r} means that {shards} ranks share one expert, "
            f"but the group's number of ranks ({world_size}) is no multiple of that"
        )
    return num_local_experts, shards


def _experts_and_shards(name: str, count: Any) -> tuple[int, int]:
    if isinstance(count, float) and 0 < count < 1:
        shards = round(1 / count)
        if 1 / shards != count:
            raise ValueError(f"{name} must be a whole number, or 1 / n for a whole n, got {count!r}")
        return 1, shards
    number = check_int(name, count)
    if number == 0:
        raise ValueError(f"{name} must not be 0")
    return (number, 1) if number > 0 else (1, -number)
