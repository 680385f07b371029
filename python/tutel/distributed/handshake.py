"""What ranks tell each other before rows travel: how many come, and whether all do the same thing.

The first exchange of a forward pass carries both, so that ranks which differ in an option find out before a collective
hangs.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, distributed

from tutel.distributed.failure import stage
from tutel.distributed.groups import Group, world_rank, world_size


class GroupSync:
    """Agreement between the ranks of a group.

    Args:
        group: The ranks.
        device: Where their tensors are.
    """

    def __init__(self, group: Group, device: torch.device) -> None:
        self.group = group
        self.device = device

    def max(self, value: int) -> int:
        """Return the largest of the ranks' values."""
        largest = torch.tensor([value], dtype=torch.int64, device=self.device)
        with stage("agreement on the largest number of tokens", self.group):
            distributed.all_reduce(largest, distributed.ReduceOp.MAX, group=self.group)
        return int(largest)


def exchange_counts(counts: Tensor, settings: Mapping[str, int], group: Group) -> Tensor:
    """Tell every rank how many rows it gets, and compare settings.

    Args:
        counts: [W, n] int64, what rank w is to know.
        settings: What has to be the same on all ranks.
        group: The ranks.

    Returns:
        [W, n] int64 on the CPU: what the ranks told this one.

    Raises:
        ValueError: If a rank's settings differ from this one's, on every rank of the group.
    """
    mine = torch.tensor([list(settings.values())], dtype=torch.int64, device=counts.device)
    message = torch.cat([mine.expand(counts.shape[0], -1), counts], dim=1)
    answer = torch.empty_like(message)
    with stage("agreement on the numbers of rows", group):
        distributed.all_to_all_single(answer, message, group=group)
    return _same_settings(answer.cpu(), settings, group)


def agree(settings: Mapping[str, int], group: Group, device: torch.device) -> None:
    """Compare settings, as :func:`exchange_counts` does."""
    exchange_counts(torch.empty((world_size(group), 0), dtype=torch.int64, device=device), settings, group)


def gather_count(count: int, settings: Mapping[str, int], group: Group, device: torch.device) -> list[int]:
    """Return every rank's count, and compare settings as :func:`exchange_counts` does."""
    counts = torch.full((world_size(group), 1), count, dtype=torch.int64, device=device)
    return exchange_counts(counts, settings, group).flatten().tolist()


def _same_settings(answer: Tensor, settings: Mapping[str, int], group: Group) -> Tensor:
    theirs, counts = answer[:, : len(settings)], answer[:, len(settings) :]
    mine = list(settings.values())
    for rank, values in enumerate(theirs.tolist()):
        for name, here, there in zip(settings, mine, values, strict=True):
            if here != there:
                raise ValueError(
                    f"the ranks of a layer must call it alike: {name} is {here} on rank {world_rank(group)}, "
                    f"but {there} on rank {rank}"
                )
    return counts.contiguous()
