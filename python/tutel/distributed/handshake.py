"""What ranks tell each other before rows travel: how many come, and how many tokens a rank has at most."""

import torch
from torch import Tensor, distributed
from torch.distributed import ReduceOp

from tutel.distributed.failure import stage
from tutel.distributed.groups import Group
from tutel.distributed.transport import all_reduce


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
        return int(all_reduce("the largest number of tokens", largest, self.group, ReduceOp.MAX))


def exchange_counts(counts: Tensor, group: Group) -> Tensor:
    """Tell every rank how many rows it gets.

    Args:
        counts: [W, n] int64, what rank w is to know.
        group: The ranks.

    Returns:
        [W, n] int64 on the CPU: what the ranks told this one.
    """
    # Not transport.exchange: the layer has compared what ranks do, and this is once a forward.
    answer = torch.empty_like(counts, memory_format=torch.contiguous_format)
    with stage("exchange of the numbers of rows", group):
        distributed.all_to_all_single(answer, counts.contiguous(), group=group)
    return answer.cpu()
