"""Whether values of several ranks are the same, to the bit."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def same(left: Any, right: Any) -> bool:
    """Tell whether two values are the same: tensors in dtype, shape and bits, collections in each of their parts."""
    if isinstance(left, Tensor) or isinstance(right, Tensor):
        return isinstance(left, Tensor) and isinstance(right, Tensor) and _same_bits(left, right)
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        return left.keys() == right.keys() and all(same(value, right[key]) for key, value in left.items())
    if isinstance(left, Sequence) and isinstance(right, Sequence) and not isinstance(left, str | bytes):
        return len(left) == len(right) and all(map(same, left, right))
    return type(left) is type(right) and bool(left == right)


def _same_bits(left: Tensor, right: Tensor) -> bool:
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    # As bytes: NaN is the same as NaN, and 0.0 is not -0.0.
    one, other = (value.detach().cpu().reshape(-1).contiguous().view(torch.uint8) for value in (left, right))
    return torch.equal(one, other)
