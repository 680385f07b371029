"""Experts ready to compute: the module, the weights that it computes with, and what a user's own experts see."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tutel.experts.context import ExpertContext
from tutel.experts.padded import compute_experts, takes_padded, takes_tokens
from tutel.experts.rows import PaddedRows, Rows
from tutel.functional import Routes


@dataclass(frozen=True)
class ExpertWork:
    """What a dispatcher has computed.

    Attributes:
        experts: The module.
        weights: What its ``weights()`` gave, perhaps gathered from other ranks; None where a module uses its own.
        context: For a user's own experts.
        skip: Whether rows stay as they are, to measure what surrounds the experts.
    """

    experts: nn.Module
    weights: Any
    context: ExpertContext
    skip: bool = False

    @property
    def padded(self) -> bool:
        """Whether rows have to be :class:`PaddedRows`."""
        return takes_padded(self.experts)

    def needs_grad(self) -> bool:
        """Whether outputs need a gradient even where inputs do not."""
        return not self.skip and any(parameter.requires_grad for parameter in self.experts.parameters())

    def takes_tokens(self, tokens: Tensor) -> bool:
        """Whether :meth:`compute_tokens` can be called."""
        return not self.skip and takes_tokens(self.experts, tokens)

    def compute_tokens(self, tokens: Tensor, routes: Routes, offsets: Tensor) -> Tensor:
        """Compute tokens [T, D] to [T, D_out] without rows in between."""
        output: Tensor = self.experts.compute_tokens(tokens, routes, offsets, self.weights)  # type: ignore[operator]
        return output

    def compute(self, rows: Rows | PaddedRows) -> Rows | PaddedRows:
        """Compute rows in the layout that :attr:`padded` asks for."""
        return rows if self.skip else compute_experts(self.experts, rows, self.weights, self.context)
