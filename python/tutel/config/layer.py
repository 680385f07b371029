"""The layer's own options."""

import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tutel.config.experts import ExpertsConfig, ModulesConfig
from tutel.errors import check_choice, check_int, one_of

#: What rows may be narrowed to while they travel.
WIRE_DTYPES = ("bfloat16", "float8_e4m3")

_DEPRECATED = {
    "pad_samples": "batches may have any size now",
    "fp32_gate": "set 'fp32_gate' in gate_type",
}


def take_deprecated(
    options: Mapping[str, Any], gates: list[Mapping[str, Any]], *, constructor: Callable[..., object]
) -> list[Mapping[str, Any]]:
    """Warn of options that programs still pass, and return the gates with what moved there.

    Args:
        options: What the layer's constructor does not name.
        gates: The gates' dicts.
        constructor: The layer's, whose arguments an error lists.

    Raises:
        TypeError: If an option never existed.
    """
    unknown = [name for name in options if name not in _DEPRECATED]
    if unknown:
        parameters = inspect.signature(constructor).parameters.values()
        allowed = [parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD]
        raise TypeError(f"moe_layer has no argument {', '.join(map(repr, unknown))}; allowed are {one_of(allowed)}")
    for name in options:
        warnings.warn(f"moe_layer({name}=) is deprecated: {_DEPRECATED[name]}", DeprecationWarning, stacklevel=3)
    if "fp32_gate" in options:
        kinds = ("top", "cosine_top")
        return [
            {"fp32_gate": options["fp32_gate"], **gate} if gate.get("type", "top") in kinds else gate for gate in gates
        ]
    return gates


def parallel_degree(parallel_type: object, sharded_count: int) -> int:
    """Return the degree of model parallelism among the ranks that share an expert.

    Raises:
        TypeError: If r of 'adaptive:r' is no integer.
        ValueError: If the type is unknown, or r does not divide the number of ranks.
    """
    named = {"data": 1, "model": sharded_count, "auto": 1}
    if isinstance(parallel_type, str) and parallel_type in named:
        return named[parallel_type]
    kind, _, degree = str(parallel_type).partition(":")
    if kind != "adaptive":
        raise ValueError(f"parallel_type must be 'data', 'model', 'auto' or 'adaptive:r', got {parallel_type!r}")
    clamped = min(check_int("parallel_type='adaptive:r', r", degree, at_least=0), sharded_count)
    if clamped > 0 and sharded_count % clamped != 0:
        raise ValueError(
            f"parallel_type={parallel_type!r}: r must divide the number of ranks that share an expert ({sharded_count})"
        )
    return clamped


def parallel_degrees(experts: ExpertsConfig, sharded_count: int, world_size: int) -> list[int]:
    """Return the degrees of model parallelism that experts allow; 0 gathers all experts to every rank."""
    if isinstance(experts, ModulesConfig) and world_size > 1:
        return [1]  # a user's modules stay whole, and where they are
    return [0, *(degree for degree in range(1, sharded_count + 1) if sharded_count % degree == 0)]


@dataclass(frozen=True)
class ExchangeConfig:
    """How rows reach the ranks of their experts.

    Attributes:
        kind: One of :data:`EXCHANGES`.
        hierarchical: Inside nodes first, then across.
        wire_dtype: What rows are narrowed to while they travel.
    """

    kind: str = "ragged"
    hierarchical: bool = False
    wire_dtype: str | None = None


EXCHANGES = ("ragged", "fixed", "gather")


def exchange_config(kind: object, *, use_2dh: bool, wire_dtype: object) -> ExchangeConfig:
    """Check how rows are exchanged.

    Raises:
        ValueError: If a name is unknown, or the hierarchy is asked for where there is none.
    """
    known = check_choice("exchange", kind, EXCHANGES)
    wire = check_choice("wire_dtype", wire_dtype, (None, *WIRE_DTYPES))
    if use_2dh and known != "ragged":
        raise ValueError(f"use_2dh=True needs exchange='ragged', got {known!r}")
    if wire is not None and known == "gather":
        raise ValueError(f"wire_dtype={wire!r} does not apply to exchange='gather'")
    return ExchangeConfig(known, use_2dh, wire)


def check_seeds(seeds: Any) -> tuple[int | None, int | None, int | None]:
    """Return (shared, local, after); the last may be left out.

    Raises:
        TypeError: If a seed is neither an integer nor None.
        ValueError: If there are not two or three, or one is beyond what torch takes.
    """
    if seeds is None:
        return None, None, None
    if not isinstance(seeds, tuple | list) or len(seeds) not in (2, 3):
        raise ValueError(f"seeds must be (shared, local) or (shared, local, after), got {seeds!r}")
    checked = [None if seed is None else check_int("seeds", seed, at_least=-(2**63)) for seed in (*seeds, None)]
    for seed in checked:
        if seed is not None and seed >= 2**64:
            raise ValueError(f"seeds must be below 2**64, got {seed}")
    return checked[0], checked[1], checked[2]
