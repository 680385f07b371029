"""The gate ``megatron``: tensor parallelism of one expert over the group, without routing.

On one rank the expert is whole: every token passes it.
"""

import torch
from torch import Tensor, nn

from tutel.experts import ExpertContext, PaddedRows, Rows, compute_experts, takes_padded


def compute_dense(experts: nn.Module, tokens: Tensor, context: ExpertContext) -> Tensor:
    """Compute tokens [T, D] by the only expert: [T, D_out]."""
    rows: Rows | PaddedRows
    if takes_padded(experts):
        rows = PaddedRows(tokens.unsqueeze(0))
        return compute_experts(experts, rows, context).data.squeeze(0)
    rows = Rows(tokens, torch.tensor([0, tokens.shape[0]], device=tokens.device))
    return compute_experts(experts, rows, context).data
