"""Experts ``llama_ffn``: y = (act(x W1) * (x W2)) W3 (Shazeer, 2020, "GLU Variants Improve Transformer")."""

import torch
from torch import Tensor, nn

from tutel.config import LlamaFFNConfig
from tutel.experts.activation import known_activation
from tutel.experts.own import OwnExperts
from tutel.experts.precision import compute_dtype
from tutel.experts.rows import Rows
from tutel.experts.shards import Gather, join_hidden
from tutel.functional import Routes, expert_ffn, grouped_gemm


class LlamaFFNExperts(OwnExperts, nn.Module):
    """The gated experts of one rank, without biases; initial values are normal with standard deviation 0.01.

    Attributes:
        W_fc1: [e, D, H], the gate.
        W_fc2: [e, D, H].
        W_fc3: [e, H, D].
    """

    padded = False

    def __init__(self, model_dim: int, config: LlamaFFNConfig) -> None:
        super().__init__()
        self.config = config
        self.num_local_experts = config.num_local_experts
        self.output_dim = model_dim
        experts, hidden = config.num_local_experts, config.hidden_size
        shapes = [(experts, model_dim, hidden), (experts, model_dim, hidden), (experts, hidden, model_dim)]
        self.W_fc1, self.W_fc2, self.W_fc3 = (
            nn.Parameter(torch.empty(shape, device="cpu").normal_(0, 0.01)) for shape in shapes
        )

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return this rank's parameters."""
        return self.W_fc1, self.W_fc2, self.W_fc3

    def gather_weights(
        self,
        parts: Gather,
        biases: Gather,  # noqa: ARG002  (one signature for all experts; these have no biases)
        count: int,
        *,
        leads: bool,  # noqa: ARG002
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the weights of whole experts, or of larger parts of them."""
        fc1, fc2, fc3 = (parts(weight) for weight in self.weights())
        return join_hidden(fc1, count, dim=2), join_hidden(fc2, count, dim=2), join_hidden(fc3, count, dim=1)

    def fused(self) -> str | None:
        """Return the name of the activation if all of an expert can be computed in fused passes."""
        return known_activation(self.config.activation)

    def compute_tokens(
        self, tokens: Tensor, routes: Routes, offsets: Tensor, weights: tuple[Tensor, Tensor, Tensor]
    ) -> Tensor:
        """Compute tokens [T, D], in the weights' dtype, to [T, D]; only where :meth:`fused` gives a name."""
        activation = self.fused()
        assert activation is not None
        fc1, fc2, fc3 = weights
        return expert_ffn(tokens, fc1, fc3, offsets, activation=activation, value=fc2, routes=routes)

    def compute(self, rows: Rows, weights: tuple[Tensor, Tensor, Tensor]) -> Rows:
        """Compute each expert's rows, in the weights' dtype (in autocast's, where that is on)."""
        dtype = compute_dtype(rows.data, weights[0])
        fc1, fc2, fc3 = (weight.to(dtype) for weight in weights)
        data = rows.data.to(dtype)
        if (activation := self.fused()) is not None:
            output = expert_ffn(data, fc1, fc3, rows.offsets, activation=activation, value=fc2)
            return Rows(output.to(rows.data.dtype), rows.offsets)
        gate = self.config.activation(grouped_gemm(data, fc1, rows.offsets)).to(dtype)
        output = grouped_gemm(gate * grouped_gemm(data, fc2, rows.offsets), fc3, rows.offsets)
        return Rows(output.to(rows.data.dtype), rows.offsets)

    def extra_repr(self) -> str:
        """Describe the sizes."""
        experts, model_dim, hidden = self.W_fc1.shape
        return f"num_local_experts={experts}, {model_dim} -> {hidden} -> {model_dim}"
