"""The layer as PyTorch code has it: a loop over experts, and a sort with torch's grouped product."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tutel.moe import MOELayer


def _route(gate: nn.Linear, tokens: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    # In fp32 at least, as our gate is told to: the stored weight may be of a half type.
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    scores = F.softmax(F.linear(tokens.to(dtype), gate.weight.to(dtype)), dim=1)
    weights, ids = torch.topk(scores, top_k, dim=1)
    if top_k > 1:
        weights = weights / weights.sum(dim=1, keepdim=True)
    return ids, weights.to(tokens.dtype)


def _gate_like(layer: MOELayer) -> nn.Linear:
    source = layer.get_parameter("gates.0.wg.weight")
    gate = nn.Linear(source.shape[1], source.shape[0], bias=False, dtype=source.dtype)
    gate.load_state_dict({"weight": source.detach().clone()})
    return gate


def _experts_of(layer: MOELayer) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return fc1 [E, H, D], fc2 [E, H, D] and their biases, by their names in a checkpoint."""
    names = ("batched_fc1_w", "batched_fc2_w", "batched_fc1_bias", "batched_fc2_bias")
    fc1, fc2, fc1_bias, fc2_bias = (layer.get_parameter(f"experts.{name}").detach() for name in names)
    return fc1, fc2, fc1_bias, fc2_bias


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    # Drawing values that are overwritten at once would take most of the time of making 256 experts.
    linear = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype, device="meta").to_empty(device="cpu")
    linear.load_state_dict({"weight": weight.contiguous(), "bias": bias})
    return linear


class LoopLayer(nn.Module):
    """A module an expert; each gathers its tokens, computes them and adds them to the output."""

    def __init__(self, layer: MOELayer, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.gate = _gate_like(layer)
        fc1, fc2, fc1_bias, fc2_bias = _experts_of(layer)
        self.experts = nn.ModuleList(
            nn.Sequential(
                _linear(fc1[e], fc1_bias[e]),
                nn.ReLU(),
                _linear(fc2[e].T, fc2_bias[e]),
            )
            for e in range(len(fc1))
        )

    def forward(self, given: Tensor) -> Tensor:
        """Compute tokens [..., D]."""
        tokens = given.reshape(-1, given.shape[-1])
        ids, weights = _route(self.gate, tokens, self.top_k)
        output = torch.zeros_like(tokens)
        mask = F.one_hot(ids, len(self.experts)).permute(2, 1, 0)  # [E, K, T]
        for expert, module in enumerate(self.experts):
            choice, token = torch.where(mask[expert])
            if token.numel():
                rows = module(tokens[token]) * weights[token, choice, None]
                output.index_add_(0, token, rows)
        return output.reshape(given.shape)

    def first_fc1_grad(self) -> Tensor | None:
        """Return the gradient of the first expert's first matrix."""
        return self.get_parameter("experts.0.0.weight").grad


class GroupedLayer(nn.Module):
    """Choices sorted by expert, two grouped products, and a weighted sum of the rows put back in order."""

    def __init__(self, layer: MOELayer, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.gate = _gate_like(layer)
        self.fc1, self.fc2, self.fc1_bias, self.fc2_bias = (
            nn.Parameter(tensor.clone()) for tensor in _experts_of(layer)
        )

    def forward(self, given: Tensor) -> Tensor:
        """Compute tokens [..., D]."""
        tokens = given.reshape(-1, given.shape[-1])
        ids, weights = _route(self.gate, tokens, self.top_k)
        order = torch.argsort(ids.flatten(), stable=True)
        expert = ids.flatten()[order]
        ends = torch.bincount(expert, minlength=self.fc1.shape[0]).cumsum(0).to(torch.int32)
        rows = tokens[order // self.top_k]
        hidden = F.relu(F.grouped_mm(rows, self.fc1.transpose(1, 2), offs=ends) + self.fc1_bias[expert])
        rows = F.grouped_mm(hidden, self.fc2, offs=ends) + self.fc2_bias[expert]
        rows = rows * weights.flatten()[order, None]
        back = torch.empty_like(order)
        back[order] = torch.arange(order.numel())
        return rows[back].view(tokens.shape[0], self.top_k, -1).sum(dim=1).reshape(given.shape)

    def first_fc1_grad(self) -> Tensor | None:
        """Return the gradient of the first expert's first matrix."""
        return None if self.fc1.grad is None else self.fc1.grad[0]
