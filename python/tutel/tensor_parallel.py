"""The gate ``megatron``: tensor parallelism of one expert over the group, without routing (Shoeybi et al., 2019).

Every rank has its own hidden units of the expert. All ranks' tokens are gathered, each rank computes them by its units,
and the sums over the ranks go back to where the tokens came from.
"""

import torch
from torch import Tensor

from tutel.distributed.agreement import agree_on
from tutel.distributed.gathering import gather_tokens, scatter_sums
from tutel.distributed.groups import Group, world_size
from tutel.distributed.handshake import GroupSync
from tutel.experts import ExpertWork, PaddedRows, Rows


def compute_dense(tokens: Tensor, work: ExpertWork, group: Group) -> Tensor:
    """Compute tokens [T, D] by the only expert: [T, D_out]."""
    if world_size(group) == 1:
        return _compute(tokens, work)
    agree_on("forward of a layer", {"gate": "megatron", "dtype": tokens.dtype, "model_dim": tokens.shape[1]}, group)
    most = GroupSync(group, tokens.device).max(tokens.shape[0])
    return scatter_sums(_compute(gather_tokens(tokens, most, group), work), tokens.shape[0], group)


def _compute(tokens: Tensor, work: ExpertWork) -> Tensor:
    if work.padded:
        return work.compute(PaddedRows(tokens.unsqueeze(0))).data.squeeze(0)
    return work.compute(Rows(tokens, torch.tensor([0, tokens.shape[0]], device=tokens.device))).data
