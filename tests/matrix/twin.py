"""The naive twin of a layer with any gate and any experts, on top of the twins of the routing in tests/reference.py.

What is the user's own (gates, experts, activations) is called as it is; all of ours is computed here once more.
Half types are widened within a step and rounded at its end; only the cosine gate is plain torch here as there.
"""

import itertools

import reference
import torch
from reference import product, wide
from torch import nn
from tutel.experts import FFNExperts, LlamaFFNExperts, ModuleExperts
from tutel.gates import CosineGate, LinearGate


def linear(x, weight, bias=None):
    """``x @ weight.T + bias``, rounded once."""
    total = product(wide(x), wide(weight).T)
    return (total if bias is None else total + wide(bias)).to(x.dtype)


def unit(vectors, dim):
    """Vectors of length 1, each step rounded: no operator of ours normalises."""
    return vectors / (vectors**2).sum(dim=dim, keepdim=True).sqrt().clamp_min(1e-12)


def logits(gate, tokens):
    """[T, E], without noise."""
    if isinstance(gate, LinearGate):
        return linear(tokens.to(gate.wg.weight.dtype), gate.wg.weight)
    if isinstance(gate, CosineGate):
        projector = gate.cosine_projector
        projected = linear(tokens.to(projector.weight.dtype), projector.weight, projector.bias)
        cosines = linear(unit(projected, 1), unit(gate.sim_matrix, 0).T)
        return cosines * torch.exp(gate.temperature.clamp(max=torch.tensor(100.0).log().item()))
    return gate(tokens)


def ffn(experts, rows, offsets):
    config = experts.config
    hidden = reference.grouped_gemm(
        rows, experts.batched_fc1_w, offsets, experts.batched_fc1_bias, transposed=True
    )  # fmt: skip
    bounds = offsets.tolist()
    parts = []
    for start, end in itertools.pairwise(bounds):
        part = hidden[start:end]
        if config.activation_with_self is not None:
            parts.append(config.activation_with_self(part, experts))
        elif config.padded:
            parts.append(config.activation(part.unsqueeze(0)).squeeze(0))
        else:
            parts.append(config.activation(part))
    parts.append(parts[0].new_zeros((rows.shape[0] - bounds[-1], config.hidden_size)))
    return reference.grouped_gemm(torch.cat(parts), experts.batched_fc2_w, offsets, experts.batched_fc2_bias)


def llama_ffn(experts, rows, offsets):
    gate = reference.grouped_gemm(rows, experts.W_fc1, offsets)
    hidden = experts.config.activation(gate) * reference.grouped_gemm(rows, experts.W_fc2, offsets)
    return reference.grouped_gemm(hidden, experts.W_fc3, offsets)


def of_rows(function, rows, offsets):
    """Call ``function(e, rows of e)`` for each expert; zeros behind."""
    bounds = offsets.tolist()
    parts = [function(e, rows[start:end]) for e, (start, end) in enumerate(itertools.pairwise(bounds))]
    return torch.cat([*parts, parts[0].new_zeros((rows.shape[0] - bounds[-1], parts[0].shape[1]))])


def stacked(function, rows, offsets):
    """Call a function of [e, rows, D] on the experts' rows, filled up with zeros."""
    bounds = offsets.tolist()
    owned = [rows[start:end] for start, end in itertools.pairwise(bounds)]
    output = function(nn.utils.rnn.pad_sequence(owned, batch_first=True))
    return of_rows(lambda e, part: output[e, : len(part)], rows, offsets)


def compute(experts, rows, offsets):
    if isinstance(experts, FFNExperts):
        custom = experts.config.custom_fn
        if custom is not None:
            return stacked(lambda x: custom(experts, x), rows, offsets)
        return ffn(experts, rows, offsets)
    if isinstance(experts, LlamaFFNExperts):
        return llama_ffn(experts, rows, offsets)
    if isinstance(experts, ModuleExperts):
        return of_rows(lambda e, part: experts[e](part), rows, offsets)
    return stacked(lambda x: experts(x, None), rows, offsets)


def forward(layer, tokens):
    """Output [T, D_out] and auxiliary loss."""
    num_tokens = tokens.shape[0]
    if not layer.gates:
        output = compute(layer.experts, tokens, torch.tensor([0, num_tokens]))
        return output, output.new_zeros(())
    routing = layer._routing[0]
    scores_of = logits(layer.gates[0], tokens)
    num_experts, top_k = scores_of.shape[1], min(layer.gates[0].top_k, scores_of.shape[1])
    chosen = reference.select_experts(scores_of, top_k, normalize=routing.normalize)
    counts = reference.assign_rows(chosen.ids, num_experts).tokens_per_expert.tolist()
    capacity = reference.drop_threshold(routing.capacity_factor, num_tokens, num_experts, top_k, counts)
    plan = reference.assign_rows(chosen.ids, num_experts, capacity)
    weights = chosen.weights.to(reference.accumulator(tokens.dtype))
    rows = reference.dispatch(tokens, plan.row_choice, top_k, None if layer.is_postscore else weights)
    rows = compute(layer.experts, rows, plan.offsets)
    output = reference.combine(rows, plan.row_index, weights if layer.is_postscore else None)
    # In the sums' dtype: torch divides integers in its default dtype.
    first_choices = plan.first_choices.to(chosen.score_sums.dtype)
    return output, reference.gshard_loss(chosen.score_sums, first_choices, num_tokens, scores_of.dtype)
