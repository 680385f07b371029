"""The raw operators of the Rust module, and what their Python faces share."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from tutel import _core  # noqa: F401  (importing it registers the operators)

if TYPE_CHECKING:
    operators: Any
else:
    operators = torch.ops.tutel


_F = TypeVar("_F", bound=Callable[..., Any])


def fake(name: str) -> Callable[[_F], _F]:
    """Register a function as the fake kernel of an operator: what it returns has the right shapes, but no values."""
    decorator: Callable[[_F], _F] = torch.library.register_fake(f"tutel::{name}")
    return decorator


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return what sums of a dtype are accumulated in, and routing weights kept in: fp32, or fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """Return the tensor with its elements in order, as the operators take them."""
    return None if tensor is None else tensor.contiguous()
