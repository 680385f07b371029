"""Experts ``ffn``: y = act(x W1 + b1) W2 + b2."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tutel.config import FFNConfig
from tutel.experts.activation import known_activation
from tutel.experts.own import OwnExperts
from tutel.experts.precision import compute_dtype
from tutel.experts.rows import PaddedRows, Rows
from tutel.experts.shards import Gather, join_hidden
from tutel.functional import Routes, expert_ffn, grouped_gemm


@dataclass(frozen=True)
class FFNWeights:
    """The tensors of the experts that are computed together.

    Attributes:
        fc1: [e, fc1_copies * H, D].
        fc2: [e, H, D_out].
        fc1_bias: [e, fc1_copies * H].
        fc2_bias: [e, D_out].
    """

    fc1: Tensor
    fc2: Tensor
    fc1_bias: Tensor | None
    fc2_bias: Tensor | None

    def to(self, dtype: torch.dtype) -> "FFNWeights":
        """Return all tensors in a dtype."""
        biases = [None if bias is None else bias.to(dtype) for bias in (self.fc1_bias, self.fc2_bias)]
        return FFNWeights(self.fc1.to(dtype), self.fc2.to(dtype), *biases)


class FFNExperts(OwnExperts, nn.Module):
    """The two-layer experts of one rank.

    Initial values are those of ``nn.Linear(D, fc1_copies * H)`` and ``nn.Linear(H, D_out)``, drawn expert by expert on
    the CPU in torch's default dtype.
    """

    batched_fc1_bias: nn.Parameter | None
    batched_fc2_bias: nn.Parameter | None

    def __init__(self, model_dim: int, config: FFNConfig) -> None:
        super().__init__()
        self.config = config
        self.num_local_experts = config.num_local_experts
        self.output_dim = model_dim if config.output_dim is None else config.output_dim
        self.padded = config.padded
        width, hidden = config.fc1_copies * config.hidden_size, config.hidden_size
        bias_width = -(-self.output_dim // config.shards)
        layers = []
        for _ in range(config.num_local_experts):
            fc1 = nn.Linear(model_dim, width, bias=config.fc1_bias, device="cpu")
            layers.append((fc1, nn.Linear(hidden, self.output_dim, bias=config.fc2_bias, device="cpu")))
        with torch.no_grad():
            self.batched_fc1_w = nn.Parameter(torch.stack([fc1.weight for fc1, _ in layers]))
            self.batched_fc2_w = nn.Parameter(torch.stack([fc2.weight.T for _, fc2 in layers]))
            fc1_bias = torch.stack([fc1.bias for fc1, _ in layers]) if config.fc1_bias else None
            fc2_bias = torch.stack([fc2.bias[:bias_width] for _, fc2 in layers]) if config.fc2_bias else None
        self.register_parameter("batched_fc1_bias", None if fc1_bias is None else nn.Parameter(fc1_bias))
        self.register_parameter("batched_fc2_bias", None if fc2_bias is None else nn.Parameter(fc2_bias))

    def weights(self) -> FFNWeights:
        """Return this rank's parameters."""
        return FFNWeights(self.batched_fc1_w, self.batched_fc2_w, self.batched_fc1_bias, self.batched_fc2_bias)

    def gather_weights(self, parts: Gather, biases: Gather, count: int, *, leads: bool) -> FFNWeights:
        """Return the weights of whole experts, or of larger parts of them."""
        own = self.weights()

        def joined(part: Tensor) -> Tensor:
            return join_hidden(parts(part), count, dim=1, copies=self.config.fc1_copies)

        bias = own.fc2_bias
        if bias is not None:
            whole = biases(bias).view(-1, self.config.shards * bias.shape[1])[:, : self.output_dim]
            bias = whole if leads else whole * 0  # not None: ranks gather gradients together
        return FFNWeights(
            joined(own.fc1),
            join_hidden(parts(own.fc2), count, dim=1),
            None if own.fc1_bias is None else joined(own.fc1_bias),
            bias,
        )

    def fused(self) -> str | None:
        """Return the name of the activation if all of an expert can be computed in fused passes."""
        config = self.config
        dropout = config.dropout and self.training
        own = config.padded or config.activation_with_self is not None or config.fc1_copies != 1
        return None if dropout or own else known_activation(config.activation)

    def compute_tokens(self, tokens: Tensor, routes: Routes, offsets: Tensor, weights: FFNWeights) -> Tensor:
        """Compute tokens [T, D], in the weights' dtype, to [T, D_out]; only where :meth:`fused` gives a name."""
        return self._expert_ffn(tokens, offsets, weights, routes)

    def _expert_ffn(self, data: Tensor, offsets: Tensor, weights: FFNWeights, routes: Routes | None) -> Tensor:
        activation = self.fused()
        assert activation is not None
        return expert_ffn(
            data,
            weights.fc1,
            weights.fc2,
            offsets,
            activation=activation,
            fc1_bias=weights.fc1_bias,
            fc2_bias=weights.fc2_bias,
            transposed=True,
            routes=routes,
        )

    def compute(self, rows: Rows, weights: FFNWeights) -> Rows:
        """Compute each expert's rows, in the weights' dtype (in autocast's, where that is on)."""
        dtype = compute_dtype(rows.data, weights.fc1)
        weights = weights.to(dtype)
        offsets = rows.offsets
        if self.fused() is not None:
            output = self._expert_ffn(rows.data.to(dtype), offsets, weights, None)
            return Rows(output.to(rows.data.dtype), offsets)
        hidden = grouped_gemm(rows.data.to(dtype), weights.fc1, offsets, weights.fc1_bias, transposed=True)
        hidden = self._dropout(self._activate(hidden).to(dtype))
        output = self._dropout(grouped_gemm(hidden, weights.fc2, offsets, weights.fc2_bias))
        return Rows(output.to(rows.data.dtype), offsets)

    def compute_padded(self, rows: PaddedRows, weights: FFNWeights) -> PaddedRows:
        """Compute rows [e, C, D] where the activation, or the user's whole function, relates rows to each other."""
        data = rows.data.to(compute_dtype(rows.data, weights.fc1))
        if self.config.custom_fn is not None:
            return PaddedRows(self.config.custom_fn(self, data))  # whoever called checks it, and casts
        weights = weights.to(data.dtype)
        hidden = data @ weights.fc1.transpose(1, 2)
        hidden = hidden if weights.fc1_bias is None else hidden + weights.fc1_bias.unsqueeze(1)
        hidden = self._dropout(self._activate(hidden).to(data.dtype))
        output = hidden @ weights.fc2
        output = output if weights.fc2_bias is None else output + weights.fc2_bias.unsqueeze(1)
        return PaddedRows(self._dropout(output).to(rows.data.dtype))

    def _activate(self, hidden: Tensor) -> Tensor:
        config = self.config
        if config.activation_with_self is not None:
            activated = config.activation_with_self(hidden, self)
        else:
            activated = config.activation(hidden)
        wanted = (*hidden.shape[:-1], hidden.shape[-1] // config.fc1_copies)
        if not isinstance(activated, Tensor) or activated.shape != wanted:
            found = list(activated.shape) if isinstance(activated, Tensor) else type(activated).__name__
            raise ValueError(f"activation_fn must give shape {list(wanted)} for {list(hidden.shape)}, got {found}")
        return activated

    def _dropout(self, values: Tensor) -> Tensor:
        return F.dropout(values, self.config.dropout, self.training) if self.config.dropout else values

    def extra_repr(self) -> str:
        """Describe the sizes."""
        fc1, fc2 = self.batched_fc1_w, self.batched_fc2_w
        return f"num_local_experts={fc1.shape[0]}, {fc1.shape[2]} -> {fc1.shape[1]} -> {fc2.shape[2]}"
