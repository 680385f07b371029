"""Experts: the layer's ``experts``."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tutel.errors import check_bool, check_callable, check_dict, check_int, check_keys, check_number, one_of

Activation = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class FFNConfig:
    """Experts ``ffn``: y = act(x W1 + b1) W2 + b2.

    Attributes:
        num_local_experts: Experts of this rank.
        hidden_size: H.
        activation: act, from [..., fc1_copies * H] to [..., H]. It is called on rows [R, fc1_copies * H], expert by
            expert, or on [e, rows, fc1_copies * H] when padded.
        activation_with_self: The same, called with the experts' module as second argument; takes the place of act.
        fc1_bias: Whether there is b1.
        fc2_bias: Whether there is b2.
        output_dim: Width of y; None means the width of x.
        fc1_copies: How many times H the first layer gives (2 for gated units, 3 for attention).
        dropout: Probability of dropout behind act and behind the second layer, in training.
        custom_fn: Called as f(experts' module, x [e, rows, D]) instead of all of the above.
        padded: Whether act relates rows to each other and therefore needs [e, rows, .].
        shards: Ranks that share an expert; hidden_size is that of one.
    """

    num_local_experts: int
    hidden_size: int
    activation: Activation = torch.nn.functional.relu
    activation_with_self: Callable[[Tensor, nn.Module], Tensor] | None = None
    fc1_bias: bool = True
    fc2_bias: bool = True
    output_dim: int | None = None
    fc1_copies: int = 1
    dropout: float = 0.0
    custom_fn: Callable[[nn.Module, Tensor], Tensor] | None = None
    padded: bool = False
    shards: int = 1


@dataclass(frozen=True)
class LlamaFFNConfig:
    """Experts ``llama_ffn``: y = (act(x W1) * (x W2)) W3.

    Attributes:
        num_local_experts: Experts of this rank.
        hidden_size: H.
        activation: act.
    """

    num_local_experts: int
    hidden_size: int
    activation: Activation = torch.nn.functional.silu


@dataclass(frozen=True)
class CustomExpertsConfig:
    """Experts of the user's own class, ``module(model_dim=, num_experts_per_device=, sharded_count=, **options)``.

    Attributes:
        num_local_experts: Experts of this rank.
        module: The class.
        options: Further arguments of the class.
    """

    num_local_experts: int
    module: Callable[..., Any]
    options: Mapping[str, Any]


@dataclass(frozen=True)
class ModulesConfig:
    """One module of the user's an expert.

    Attributes:
        modules: The local experts in order.
    """

    modules: tuple[nn.Module, ...]


ExpertsConfig = FFNConfig | LlamaFFNConfig | CustomExpertsConfig | ModulesConfig

_COUNTS = ("count_per_node", "num_experts_per_device")
_FFN_OPTIONS = {
    "type",
    *_COUNTS,
    "hidden_size_per_expert",
    "activation_fn",
    "activation_fn_with_self",
    "has_fc1_bias",
    "has_fc2_bias",
    "output_dim",
    "fc1_copies",
    "implicit_dropout_p",
    "fused_custom_fn",
}
_OPTIONS = {
    "ffn": _FFN_OPTIONS,
    "attention": _FFN_OPTIONS
    - {"hidden_size_per_expert", "activation_fn", "activation_fn_with_self", "fused_custom_fn"}
    | {"attention_fn"},
    "llama_ffn": {"type", *_COUNTS, "hidden_size_per_expert", "activation_fn"},
}
_KINDS = (*_OPTIONS, "custom")


def experts_config(experts: object, *, num_local_experts: int, model_dim: int) -> ExpertsConfig:
    """Translate ``experts``: a dict, a module, or a list of modules.

    Raises:
        TypeError: If it or an option has the wrong type.
        ValueError: If an option is missing, unknown, contradictory or out of range.
    """
    modules = _as_modules(experts)
    if modules is not None:
        return ModulesConfig(modules)
    given = check_dict("experts", experts)
    kind = given.get("type", "ffn")
    if kind not in _KINDS:
        raise ValueError(f"experts['type'] must be {one_of(map(repr, _KINDS))}, got {kind!r}")
    if kind == "custom":
        if "module" not in given:
            raise ValueError("experts of type 'custom' must have 'module', the experts' class")
        options = {key: value for key, value in given.items() if key not in ("type", "module", *_COUNTS)}
        return CustomExpertsConfig(num_local_experts, check_callable("experts['module']", given["module"]), options)
    check_keys("experts", given, _OPTIONS[kind])
    if kind == "llama_ffn":
        activation = _callable(given, "activation_fn") or torch.nn.functional.silu
        return LlamaFFNConfig(num_local_experts, _hidden_size(given), activation)
    if kind == "attention":
        return _attention(given, num_local_experts, model_dim)
    return _ffn(given, num_local_experts)


def _ffn(given: Mapping[str, Any], num_local_experts: int) -> FFNConfig:
    activation, with_self = _callable(given, "activation_fn"), _callable(given, "activation_fn_with_self")
    custom_fn = _callable(given, "fused_custom_fn")
    named = [name for name in ("activation_fn", "activation_fn_with_self", "fused_custom_fn") if given.get(name)]
    if custom_fn is not None and given.get("implicit_dropout_p"):
        named.append("implicit_dropout_p")  # whose places are inside the function
    if len(named) > 1:
        raise ValueError(f"experts must have only one of {one_of(map(repr, named))}")
    return FFNConfig(
        num_local_experts,
        _hidden_size(given),
        activation=activation or torch.nn.functional.relu,
        activation_with_self=with_self,
        custom_fn=custom_fn,
        padded=custom_fn is not None,
        **_common(given, fc1_copies=1),
    )


def _attention(given: Mapping[str, Any], num_local_experts: int, model_dim: int) -> FFNConfig:
    """``attention``: rows of an expert attend to each other; attention_fn maps [e, rows, 3 * D] to [e, rows, D]."""
    if given.get("attention_fn") is None:
        raise ValueError("experts of type 'attention' must have 'attention_fn'")
    attention = check_callable("experts['attention_fn']", given["attention_fn"])
    return FFNConfig(num_local_experts, model_dim, activation=attention, padded=True, **_common(given, fc1_copies=3))


def _common(given: Mapping[str, Any], *, fc1_copies: int) -> dict[str, Any]:
    output_dim = given.get("output_dim")
    dropout = check_number("experts['implicit_dropout_p']", given.get("implicit_dropout_p", 0.0), at_least=0.0)
    if dropout >= 1:
        raise ValueError(f"experts['implicit_dropout_p'] must be below 1, got {dropout}")
    return {
        "fc1_bias": check_bool("experts['has_fc1_bias']", given.get("has_fc1_bias", True)),
        "fc2_bias": check_bool("experts['has_fc2_bias']", given.get("has_fc2_bias", True)),
        "output_dim": None if output_dim is None else check_int("experts['output_dim']", output_dim, at_least=1),
        "fc1_copies": check_int("experts['fc1_copies']", given.get("fc1_copies", fc1_copies), at_least=1),
        "dropout": dropout,
    }


def _hidden_size(given: Mapping[str, Any]) -> int:
    if "hidden_size_per_expert" not in given:
        raise ValueError("experts must have 'hidden_size_per_expert'")
    return check_int("experts['hidden_size_per_expert']", given["hidden_size_per_expert"], at_least=1)


def _callable(given: Mapping[str, Any], name: str) -> Any:
    value = given.get(name)
    return None if value is None else check_callable(f"experts[{name!r}]", value)


def _as_modules(experts: object) -> tuple[nn.Module, ...] | None:
    if isinstance(experts, nn.Module) and not isinstance(experts, nn.ModuleList):
        return (experts,)
    if not isinstance(experts, nn.ModuleList | list | tuple):
        return None
    modules = tuple(experts)
    if not modules or not all(isinstance(module, nn.Module) for module in modules):
        raise TypeError(f"experts as a list must hold at least one torch.nn.Module, got {list(modules)!r}")
    return modules


def resolve_expert_count(gates: list[Mapping[str, Any]], experts: object, *, world_size: int) -> tuple[int, int]:
    """Return (experts a rank holds, ranks that share an expert); one of the two is 1.

    count_per_node = n gives (n, 1); -n or 1 / n gives (1, n), and so does a negative k of a gate, as the README says.

    Raises:
        TypeError: If a count is no number.
        ValueError: If counts contradict each other, or n ranks share an expert but do not divide the group.
    """
    modules = _as_modules(experts)
    given = {} if modules is not None else check_dict("experts", experts)
    counts = {f"experts[{key!r}]": given[key] for key in _COUNTS if key in given}
    if modules is not None:
        counts["len(experts)"] = len(modules)
    for index, gate in enumerate(gates):
        if gate.get("type", "top") != "custom" and check_int("gate_type's k", gate.get("k", 1)) < 0:
            counts[f"gate_type[{index}]['k']"] = gate["k"]
    resolved = {name: _experts_and_shards(name, count) for name, count in counts.items()}
    if len(set(resolved.values())) > 1:
        listed = ", ".join(f"{name}={count!r}" for name, count in counts.items())
        raise ValueError(f"the number of experts a device holds is given several times and differs: {listed}")
    num_local_experts, shards = next(iter(resolved.values()), (1, 1))
    if world_size % shards != 0:
        name, count = next(iter(counts.items()))
        raise ValueError(
            f"{name}={count!r} means that {shards} ranks share one expert, "
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
