"""Checks of arguments: each error names the argument, the value seen and what is allowed."""

import numbers
from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

#: What tokens, rows and weights may be made of.
FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_tensor(
    name: str,
    value: object,
    *,
    shape: tuple[int | None, ...] | None = None,
    dtypes: Collection[torch.dtype] = FLOAT_DTYPES,
    like: tuple[str, Tensor] | None = None,
) -> None:
    """Check one tensor argument.

    Args:
        name: The argument's name.
        value: The argument.
        shape: Its sizes; None stands for any size.
        dtypes: The dtypes that are allowed.
        like: Another argument's name and value, whose device must be the same.

    Raises:
        TypeError: If it is no tensor or has a dtype that is not allowed.
        ValueError: If its shape or device is wrong.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        raise TypeError(f"{name} must be {one_of(dtypes)}, got {value.dtype}")
    if shape is not None and not _fits(value.shape, shape):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must have shape [{wanted}], got {list(value.shape)}")
    if like is not None and value.device != like[1].device:
        raise ValueError(f"{name} and {like[0]} must be on one device, got {value.device} and {like[1].device}")


def _fits(sizes: torch.Size, shape: tuple[int | None, ...]) -> bool:
    # A plain loop: this runs a dozen times a forward, and a generator would cost more than the operators' calls.
    if len(sizes) != len(shape):
        return False
    for size, wanted in zip(sizes, shape, strict=True):  # noqa: SIM110
        if wanted is not None and size != wanted:
            return False
    return True


def one_of(allowed: Iterable[object]) -> str:
    """Write a list of alternatives as words."""
    words = [str(value) for value in allowed]
    return " or ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]


def check_int(name: str, value: Any, *, at_least: int | None = None) -> int:
    """Check an integer; whatever ``int()`` converts exactly is one.

    Raises:
        TypeError: If it is no integer.
        ValueError: If it is too small.
    """
    try:
        number = int(value)
        exact = isinstance(value, str) or number == value
    except (TypeError, ValueError, OverflowError):
        exact = False
    if not exact or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if at_least is not None and number < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {number}")
    return number


def check_number(name: str, value: Any, *, at_least: float | None = None) -> float:
    """Check a finite number.

    Raises:
        TypeError: If it is no number.
        ValueError: If it is not finite or too small.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):  # NumPy's scalars are real numbers too
        raise TypeError(f"{name} must be a number, got {value!r}")
    try:
        number = float(value)
    except OverflowError:
        number = float("inf")
    if number != number or number in (float("inf"), float("-inf")):
        raise ValueError(f"{name} must be finite, got {value!r}")
    if at_least is not None and number < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {value!r}")
    return number


def check_bool(name: str, value: Any) -> bool:
    """Check a switch: True, False, or the integers 1 and 0, which existing programs pass.

    Raises:
        TypeError: If it is anything else.
    """
    try:
        known = value in (True, False)
    except (RuntimeError, ValueError):  # a tensor or an array of several values
        known = False
    if not known:
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return bool(value)


T = TypeVar("T")


def check_choice(name: str, value: object, allowed: Iterable[T]) -> T:
    """Check a name against those that are known; None is one if it is among them.

    Raises:
        ValueError: If it is none of them.
    """
    known = tuple(allowed)
    for choice in known:
        if value == choice:
            return choice
    raise ValueError(f"{name} must be {one_of(map(repr, known))}, got {value!r}")


def check_keys(name: str, options: Collection[str], allowed: Collection[str]) -> None:
    """Check the keys of an options dict.

    Raises:
        ValueError: If there is a key that is not allowed.
    """
    unknown = [key for key in options if key not in allowed]
    if unknown:
        raise ValueError(
            f"{name} has unknown option {', '.join(map(repr, unknown))}; allowed are {one_of(sorted(allowed))}"
        )


def check_dict(name: str, options: object) -> Mapping[str, Any]:
    """Check that options are a dict with string keys.

    Raises:
        TypeError: If they are not.
    """
    if not isinstance(options, Mapping) or not all(isinstance(key, str) for key in options):
        raise TypeError(f"{name} must be a dict with string keys, got {options!r}")
    return options


def check_callable(name: str, value: Any) -> Any:
    """Check that a value can be called.

    Raises:
        TypeError: If it cannot.
    """
    if not callable(value):
        raise TypeError(f"{name} must be callable, got {value!r}")
    return value
