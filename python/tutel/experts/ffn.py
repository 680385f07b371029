"""Experts ``ffn``: y = act(x W1 + b1) W2 + b2."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tutel.config import FFNConfig
from tutel.experts.rows import Rows
from tutel.functional import grouped_gemm


@dataclass(frozen=True)
class FFNWeights:
    """The tensors of the experts that are computed together.

    Attributes:
        fc1: [e, H, D].
        fc2: [e, H, D_out].
        fc1_bias: [e, H].
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


class FFNExperts(nn.Module):
    """The two-layer experts of one rank.

    Initial values are those of ``nn.Linear(D, H)`` and ``nn.Linear(H, D_out)``, drawn expert by expert on the CPU in
    torch's default dtype.
    """

    batched_fc1_bias: nn.Parameter | None
    batched_fc2_bias: nn.Parameter | None

    def __init__(self, model_dim: int, config: FFNConfig) -> None:
        super().__init__()
        self.config = config
        self.output_dim = model_dim if config.output_dim is None else config.output_dim
        layers = []
        for _ in range(config.num_local_experts):
            fc1 = nn.Linear(model_dim, config.hidden_size, bias=config.fc1_bias, device="cpu")
            layers.append((fc1, nn.Linear(config.hidden_size, self.output_dim, bias=config.fc2_bias, device="cpu")))
        with torch.no_grad():
            self.batched_fc1_w = nn.Parameter(torch.stack([fc1.weight for fc1, _ in layers]))
            self.batched_fc2_w = nn.Parameter(torch.stack([fc2.weight.T for _, fc2 in layers]))
            fc1_bias = torch.stack([fc1.bias for fc1, _ in layers]) if config.fc1_bias else None
            fc2_bias = torch.stack([fc2.bias for _, fc2 in layers]) if config.fc2_bias else None
        self.register_parameter("batched_fc1_bias", None if fc1_bias is None else nn.Parameter(fc1_bias))
        self.register_parameter("batched_fc2_bias", None if fc2_bias is None else nn.Parameter(fc2_bias))

    @property
    def num_local_experts(self) -> int:
        """Experts of this rank."""
        return self.config.num_local_experts

    def weights(self) -> FFNWeights:
        """Return this rank's parameters."""
        return FFNWeights(self.batched_fc1_w, self.batched_fc2_w, self.batched_fc1_bias, self.batched_fc2_bias)

    def compute(self, rows: Rows, weights: FFNWeights) -> Rows:
        """Compute each expert's rows, in the weights' dtype (in autocast's, where that is on)."""
        device = rows.data.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weights.fc1.dtype
        weights = weights.to(dtype)
        offsets = rows.offsets
        hidden = grouped_gemm(rows.data.to(dtype), weights.fc1, offsets, weights.fc1_bias, transposed=True)
        hidden = self._activate(hidden).to(dtype)
        output = grouped_gemm(hidden, weights.fc2, offsets, weights.fc2_bias)
        return Rows(output.to(rows.data.dtype), offsets)

    def _activate(self, hidden: Tensor) -> Tensor:
        activated: Tensor = self.config.activation(hidden)
        if not isinstance(activated, Tensor) or activated.shape != hidden.shape:
            found = list(activated.shape) if isinstance(activated, Tensor) else type(activated).__name__
            raise ValueError(f"activation_fn must keep the shape {list(hidden.shape)}, got {found}")
        return activated

    def extra_repr(self) -> str:
        """Describe the sizes."""
        fc1, fc2 = self.batched_fc1_w, self.batched_fc2_w
        return f"num_local_experts={fc1.shape[0]}, {fc1.shape[2]} -> {fc1.shape[1]} -> {fc2.shape[2]}"
