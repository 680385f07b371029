"""Gates: the layer's ``gate_type``."""

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tutel import env
from tutel.config.routing import RoutingConfig
from tutel.errors import check_bool, check_callable, check_dict, check_int, check_keys, check_number, one_of


@dataclass(frozen=True)
class LinearGateConfig:
    """A gate ``top``: logits are ``tokens @ W.T``.

    Attributes:
        routing: What is chosen and dropped.
        fp32: Compute the logits in fp32 whatever the dtypes are.
        input_dropout: Probability of dropout on the layer's input in training.
    """

    routing: RoutingConfig
    fp32: bool = False
    input_dropout: float = 0.0


@dataclass(frozen=True)
class CosineGateConfig:
    """A gate ``cosine_top``: logits are cosines of projected tokens with one vector an expert.

    Attributes:
        routing: What is chosen and dropped.
        fp32: Compute the logits in fp32 whatever the dtypes are.
        proj_dim: Width of the projection.
        init_t: Initial temperature.
    """

    routing: RoutingConfig
    fp32: bool = False
    proj_dim: int = 256
    init_t: float = 0.5


@dataclass(frozen=True)
class CustomGateConfig:
    """A gate of the user's own class, made as ``module(model_dim=, num_global_experts=, **options)``.

    Attributes:
        routing: What is chosen and dropped, where the module has no such attribute itself.
        module: The class.
        options: Further arguments of the class.
    """

    routing: RoutingConfig
    module: Callable[..., Any]
    options: Mapping[str, Any]


@dataclass(frozen=True)
class MegatronGateConfig:
    """No routing: tensor parallelism of one expert over the group."""


GateConfig = LinearGateConfig | CosineGateConfig | CustomGateConfig | MegatronGateConfig

_ROUTING_OPTIONS = {"type", "k", "capacity_factor", "gate_noise", "batch_prioritized_routing"}
_OPTIONS = {
    "top": _ROUTING_OPTIONS | {"fp32_gate", "input_dropout_p"},
    "cosine_top": _ROUTING_OPTIONS | {"fp32_gate", "proj_dim", "init_t"},
    "megatron": {"type"},
}
_KINDS = (*_OPTIONS, "custom")


def gate_dicts(gate_type: object) -> list[Mapping[str, Any]]:
    """Return the gates' dicts: ``gate_type`` is one, a list of them, or the historic string 'Top<k>Gate'.

    Raises:
        TypeError: If it is none of these.
        ValueError: If it is empty or a string of another form.
    """
    if isinstance(gate_type, str):
        match = re.fullmatch(r"Top([0-9]+)Gate", gate_type)
        if match is None:
            raise ValueError(f"gate_type as a string must have the form 'Top<k>Gate', got {gate_type!r}")
        top_k = int(match.group(1))
        message = f"gate_type={gate_type!r} is deprecated: use {{'type': 'top', 'k': {top_k}}}"
        warnings.warn(message, DeprecationWarning, stacklevel=4)
        return [{"type": "top", "k": top_k}]
    if not isinstance(gate_type, list | tuple):
        return [check_dict("gate_type", gate_type)]
    if not gate_type:
        raise ValueError("gate_type must hold at least one gate, got an empty list")
    return [check_dict(f"gate_type[{index}]", gate) for index, gate in enumerate(gate_type)]


def gate_configs(gates: list[Mapping[str, Any]], *, normalize: bool, prioritized: bool) -> list[GateConfig]:
    """Translate the gates' dicts; the layer's own switches hold where a gate does not say.

    Raises:
        TypeError: If an option has the wrong type.
        ValueError: If an option is unknown, missing or out of range.
    """
    names = ["gate_type"] if len(gates) == 1 else [f"gate_type[{index}]" for index in range(len(gates))]
    configs = [_gate_config(gate, name, normalize, prioritized) for gate, name in zip(gates, names, strict=True)]
    if len(configs) > 1 and any(isinstance(config, MegatronGateConfig) for config in configs):
        raise ValueError("a gate of type 'megatron' must be the only one: it has no routing to choose from")
    return configs


def _gate_config(given: Mapping[str, Any], name: str, normalize: bool, prioritized: bool) -> GateConfig:
    kind = given.get("type", "top")
    if kind not in _KINDS:
        raise ValueError(f"{name}['type'] must be {one_of(map(repr, _KINDS))}, got {kind!r}")
    if kind == "custom":
        return _custom_gate(given, name, _routing(given, name, normalize, prioritized, top_k=1))
    check_keys(name, given, _OPTIONS[kind])
    if kind == "megatron":
        return MegatronGateConfig()
    top_k = check_int(f"{name}['k']", given.get("k", 1))
    if top_k == 0:
        raise ValueError(f"{name}['k'] must not be 0")
    # The README's negative k means one expert a token; see resolve_expert_count for what else it means.
    routing = _routing(given, name, normalize, prioritized, top_k=max(top_k, 1))
    fp32 = check_bool(f"{name}['fp32_gate']", given.get("fp32_gate", False))
    if kind == "top":
        dropout = check_number(f"{name}['input_dropout_p']", given.get("input_dropout_p", 0.0), at_least=0.0)
        if dropout >= 1:
            raise ValueError(f"{name}['input_dropout_p'] must be below 1, got {dropout}")
        return LinearGateConfig(routing, fp32, dropout)
    proj_dim = check_int(f"{name}['proj_dim']", given.get("proj_dim", 256), at_least=1)
    init_t = check_number(f"{name}['init_t']", given.get("init_t", 0.5))
    if init_t <= 0:
        raise ValueError(f"{name}['init_t'] must be positive, got {init_t}")
    return CosineGateConfig(routing, fp32, proj_dim, init_t)


def _routing(given: Mapping[str, Any], name: str, normalize: bool, prioritized: bool, *, top_k: int) -> RoutingConfig:
    factor = given.get("capacity_factor", env.capacity_factor())
    prioritized = given.get("batch_prioritized_routing", prioritized)
    return RoutingConfig(
        top_k=top_k,
        capacity_factor=check_number(f"{name}['capacity_factor']", factor),
        normalize=normalize,
        prioritized=check_bool(f"{name}['batch_prioritized_routing']", prioritized),
        gate_noise=check_number(f"{name}['gate_noise']", given.get("gate_noise", 0.0), at_least=0.0),
    )


def _custom_gate(given: Mapping[str, Any], name: str, routing: RoutingConfig) -> CustomGateConfig:
    if "module" not in given:
        raise ValueError(f"{name} of type 'custom' must have 'module', the gate's class")
    module = check_callable(f"{name}['module']", given["module"])
    return CustomGateConfig(
        routing, module, {key: value for key, value in given.items() if key not in ("type", "module")}
    )
