"""What users write: gates, experts and activations.

They stand at the top of a module, so that layers which hold them can be pickled.
"""

import torch
from torch import nn


class Gate(nn.Module):
    """A gate of one's own; it takes what it knows of the dict, and leaves the rest of its attributes out."""

    def __init__(self, model_dim, num_global_experts, top_k=2, scale=3.0, **own):
        super().__init__()
        self.top_k = top_k
        self.scale = scale
        self.seen = own
        self.score = nn.Linear(model_dim, num_global_experts)

    def forward(self, tokens):
        return torch.tanh(self.score(tokens)) * self.scale


class Experts(nn.Module):
    """All experts of a device, on [e, rows, D]. Rows of zeros give zeros: they have no bias."""

    def __init__(self, model_dim, num_experts_per_device, sharded_count, hidden_size=5, output_dim=None):
        super().__init__()
        self.made_with = (model_dim, num_experts_per_device, sharded_count)
        self.first = nn.Parameter(torch.randn(num_experts_per_device, model_dim, hidden_size))
        self.second = nn.Parameter(torch.randn(num_experts_per_device, hidden_size, output_dim or model_dim))
        self.seen = None

    def forward(self, x, ctx):
        self.seen = (x.detach(), ctx)
        return torch.bmm(torch.tanh(torch.bmm(x, self.first)), self.second)


class OlderExperts(nn.Module):
    """The older name of the number of experts."""

    def __init__(self, model_dim, local_experts, sharded_count):
        super().__init__()
        self.scale = nn.Parameter(torch.arange(1.0, local_experts + 1).view(-1, 1, 1))

    def forward(self, x, ctx):
        return x * self.scale


class Expert(nn.Module):
    """One expert, on [rows, D]."""

    def __init__(self, model_dim, hidden_size=5, output_dim=None):
        super().__init__()
        self.first = nn.Linear(model_dim, hidden_size)
        self.second = nn.Linear(hidden_size, output_dim or model_dim)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def gated(hidden):
    """fc1_copies = 2: one half gates the other."""
    left, right = hidden.chunk(2, dim=-1)
    return torch.sigmoid(left) * right


def linear_attention(hidden):
    """The rows of an expert see each other; rows of zeros add nothing, so it doesn't matter how many there are."""
    query, key, value = hidden.chunk(3, dim=-1)
    return query @ (key.transpose(1, 2) @ value) / 4


def scaled_by_bias(hidden, experts):
    """activation_fn_with_self: it reads the experts' module."""
    return torch.tanh(hidden) * (1 + experts.batched_fc1_bias.square().mean())


def fused(experts, x):
    """fused_custom_fn: everything by hand, from the experts' parameters."""
    hidden = torch.baddbmm(experts.batched_fc1_bias.unsqueeze(1), x, experts.batched_fc1_w.transpose(1, 2))
    return torch.baddbmm(experts.batched_fc2_bias.unsqueeze(1), torch.tanh(hidden), experts.batched_fc2_w)
