"""All ranks' tokens on every rank, and sums of what ranks made of them.

Symbols: W ranks of the group, M the largest number of tokens of a rank.
"""

from torch import Tensor
from torch.nn import functional as F

from tutel.distributed.collectives import all_gather, reduce_scatter
from tutel.distributed.groups import Group


def gather_tokens(values: Tensor, most: int, group: Group, *, filler: float = 0) -> Tensor:
    """Return the ranks' values [T, ...] as [W * M, ...], each rank's filled up to M; differentiable.

    Args:
        values: This rank's, of any T.
        most: M.
        group: The ranks.
        filler: What stands behind a rank's values.
    """
    missing = most - values.shape[0]
    padded = F.pad(values, (0, 0) * (values.dim() - 1) + (0, missing), value=filler) if missing else values
    return all_gather(padded, 0, group)


def scatter_sums(values: Tensor, count: int, group: Group) -> Tensor:
    """Sum the ranks' values [W * M, ...], and return the first ``count`` of this rank's [M, ...]; differentiable."""
    return reduce_scatter(values, 0, group)[:count]
