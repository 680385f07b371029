"""Parts of an expert's hidden units, put together."""

from collections.abc import Callable

from torch import Tensor

#: From this rank's part to the parts of several ranks, joined along dimension 0; differentiable.
Gather = Callable[[Tensor], Tensor]


def join_hidden(parts: Tensor, count: int, *, dim: int, copies: int = 1) -> Tensor:
    """Join each expert's parts along the dimension of its hidden units.

    Args:
        parts: [E * count, ...], the parts of an expert next to each other.
        count: How many parts an expert has.
        dim: The dimension of the hidden units, at least 1.
        copies: How many times a part has its hidden units; whole experts have all units of a copy next to each other.

    Returns:
        [E, ...], ``count`` times as large in ``dim``. Nothing is copied if that is 1 and there is one copy.
    """
    if count == 1:
        return parts
    shape = parts.shape
    size = shape[dim] // copies
    split = parts.view(-1, count, *shape[1:dim], copies, size, *shape[dim + 1 :])
    moved = split.movedim(1, dim + 1)  # [E, .., copies, count, size, ..]
    return moved.reshape(-1, *shape[1:dim], copies * count * size, *shape[dim + 1 :])
