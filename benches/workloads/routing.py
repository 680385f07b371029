"""Routes to measure on: random choices with a seed, and their rows."""

from dataclasses import dataclass

import torch
from torch import Tensor
from tutel.functional import RowAssignment, assign_rows


@dataclass(frozen=True)
class RandomRoute:
    """Dropless uniform routing of T tokens to K of E experts.

    Attributes:
        rows: The plan's indices.
        weights: [T, K] fp32, summing to 1.
        token_of_row: [R] int64.
        weight_of_row: [R] fp32.
    """

    rows: RowAssignment
    weights: Tensor
    token_of_row: Tensor
    weight_of_row: Tensor

    @classmethod
    def make(cls, tokens: int, experts: int, top_k: int) -> "RandomRoute":
        """Draw one."""
        generator = torch.Generator().manual_seed(0)
        scores, ids = torch.rand(tokens, experts, generator=generator).topk(top_k, dim=1)
        weights = scores / scores.sum(dim=1, keepdim=True)
        rows = assign_rows(ids.to(torch.int32), experts)
        choice = rows.row_choice
        return cls(rows, weights, choice // top_k, weights.flatten()[choice])
