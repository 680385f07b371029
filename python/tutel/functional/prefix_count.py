"""Running counts of a mask."""

import torch
from torch import Tensor

from tutel.errors import check_int
from tutel.functional._operators import fake, operators

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@fake("prefix_count")
def _fake(mask: Tensor, dim: int) -> Tensor:
    return mask.new_empty(mask.shape, dtype=torch.int64)


def prefix_count(mask: Tensor, dim: int = 0) -> Tensor:
    """Return the cumulative sum of a mask along a dimension, minus 1: how many came before, where the mask is 1.

    Args:
        mask: [rows, columns] of any real or bool dtype.
        dim: 0 (down the columns) or 1 (along the rows).

    Returns:
        [rows, columns] in the dtype of ``torch.cumsum``: int64 for integers and bool, else the mask's own.

    Raises:
        TypeError: If mask is no tensor, or complex.
        ValueError: If mask is not 2-D, or dim is neither 0 nor 1.
    """
    if not isinstance(mask, Tensor) or mask.is_complex():
        raise TypeError(f"mask must be a real or bool torch.Tensor, got {getattr(mask, 'dtype', type(mask).__name__)}")
    if mask.dim() != 2:
        raise ValueError(f"mask must have 2 dimensions, got shape {list(mask.shape)}")
    if check_int("dim", dim, at_least=0) > 1:
        raise ValueError(f"dim must be 0 or 1, got {dim}")
    if mask.dtype == torch.bool:
        mask = mask.view(torch.uint8)
    if mask.dtype in _INTEGERS:
        counts: Tensor = operators.prefix_count(mask.contiguous(), int(dim))
        return counts
    return torch.cumsum(mask, dim).sub_(1)
