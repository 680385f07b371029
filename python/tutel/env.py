"""Every environment variable that tutel reads, each with its meaning. Nothing else reads the environment."""

import os

from tutel.errors import one_of


def _number(name: str, default: float) -> float:
    text = os.environ.get(name, "")
    if not text:
        return default
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"environment variable {name} must be a number, got {text!r}") from None


def _switch(name: str) -> bool:
    text = os.environ.get(name, "")
    if text not in ("", "0", "1"):
        raise ValueError(f"environment variable {name} must be {one_of('01')}, got {text!r}")
    return text == "1"


def capacity_factor() -> float:
    """``CAP_FACTOR``: the capacity factor of gates that do not set one (default 1.0)."""
    return _number("CAP_FACTOR", 1.0)


def batch_prioritized_routing() -> bool:
    """``BATCH_PRIO=1``: serve tokens by descending score where the layer does not say."""
    return _switch("BATCH_PRIO")


def local_rank() -> int:
    """``LOCAL_RANK``: which device of this host a process uses, as launchers set it (default 0)."""
    return int(_number("LOCAL_RANK", 0))
