"""Quantities as people write them: ``12.5GB``, ``400Gbit``, ``5us``, ``312T``."""

import re
from argparse import ArgumentTypeError

_PREFIXES = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_TIMES = {"": 1.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}
_NUMBER = r"(\d+\.?\d*(?:[eE][+-]?\d+)?|\.\d+(?:[eE][+-]?\d+)?)\s*"


def bandwidth(text: str) -> float:
    """Read bytes a second: a number, a prefix, and B or bit (``/s`` may follow).

    Raises:
        ArgumentTypeError: If it is nothing of the kind.
    """
    number, prefix, unit = _read(text, r"([kKMGTP]?)(B|bit)?(?:/s)?", "bytes a second such as 12.5GB or 100Gbit")
    return float(number) * _PREFIXES[prefix] / (8 if unit == "bit" else 1)


def duration(text: str) -> float:
    """Read seconds: a number and s, ms, us or ns.

    Raises:
        ArgumentTypeError: If it is nothing of the kind.
    """
    number, unit = _read(text, r"(s|ms|us|µs|ns)?", "a time such as 5us or 2e-6")
    return float(number) * _TIMES[unit]


def rate(text: str) -> float:
    """Read operations a second: a number, a prefix, and perhaps FLOP/s.

    Raises:
        ArgumentTypeError: If it is nothing of the kind.
    """
    number, prefix = _read(text, r"([kKMGTP]?)(?:FLOPS|FLOP/s)?", "operations a second such as 312T")
    return float(number) * _PREFIXES[prefix]


def _read(text: str, units: str, wanted: str) -> tuple[str, ...]:
    """Return a number's text and what its units' groups have found."""
    found = re.fullmatch(_NUMBER + units, text.strip())
    if found is None:
        raise ArgumentTypeError(f"must be {wanted}, got {text!r}")
    return found.groups(default="")


def show_bytes(size: float) -> str:
    """Write bytes with three digits."""
    return _show(size, [("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1.0)])


def show_seconds(seconds: float) -> str:
    """Write a time with three digits."""
    return _show(seconds, [("s", 1.0), ("ms", 1e-3), ("us", 1e-6), ("ns", 1e-9)])


def _show(value: float, units: list[tuple[str, float]]) -> str:
    for unit, size in units:
        # What rounds to 1000 of a unit is written in the next one.
        if value >= 0.9995 * size:
            return f"{_digits(value / size)} {unit}"
    return f"0 {units[-1][0]}" if value == 0 else f"{value / units[-1][1]:.2g} {units[-1][0]}"


def _digits(value: float) -> str:
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"
