"""The naive twin of the layer and of each of its stages: plain loops, right by eye, differentiable by autograd.

Run on fp64 values it is the truth that results are compared with; run on the same values in a dtype it says how large
an error plain arithmetic makes there. As in the package, half types are widened to fp32 inside a stage and rounded
once at its end; everything else is computed in its own dtype.

Symbols: T tokens, D their width, E experts, K choices a token, H hidden units, C capacity, R rows.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from tutel import moe

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def accumulator(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def wide(tensor):
    return tensor.to(accumulator(tensor.dtype))


# --- Routing ---------------------------------------------------------------------------------------------------------


def softmax(logits):
    powers = torch.exp(logits - logits.max(dim=1, keepdim=True).values)
    return powers / powers.sum(dim=1, keepdim=True)


def top_ids(keys, top_k):
    """The K largest of each row, best first; ties go to the lower id, NaN counts as the largest."""
    rows = []
    for row in keys.tolist():
        by_size = sorted(range(len(row)), key=lambda e: (0, 0.0, e) if math.isnan(row[e]) else (1, -row[e], e))
        rows.append(by_size[:top_k])
    return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), top_k)


class Selection(NamedTuple):
    ids: Tensor
    weights: Tensor
    top_scores: Tensor
    score_sums: Tensor


def select_experts(logits, top_k, *, use_softmax=True, normalize=True, eps=None):
    """``eps`` is the least divisor; it belongs to the dtype whose truth is sought, hence may be given."""
    ids = top_ids(logits, top_k)
    scores = softmax(wide(logits)) if use_softmax else wide(logits)
    weights = chosen = torch.gather(scores, 1, ids)
    if normalize and top_k > 1:
        total = chosen.sum(dim=1, keepdim=True)
        least = torch.finfo(logits.dtype).eps if eps is None else eps
        weights = chosen / torch.where(total < least, torch.full_like(total, least), total)
    return Selection(ids, weights, chosen[:, 0], scores.sum(dim=0))


def drop_threshold(factor, num_tokens, num_experts, top_k, counts):
    """C, the specification's formula as it stands."""
    share = math.ceil(num_tokens / num_experts)
    if factor > 0:
        return top_k * int(factor * share)
    needed = max(counts, default=0)
    return needed if factor == 0 else min(needed, top_k * int(-factor * share))


class Assignment(NamedTuple):
    slots: Tensor
    tokens_per_expert: Tensor
    first_choices: Tensor
    offsets: Tensor
    row_index: Tensor
    row_choice: Tensor


def assign_rows(ids, num_experts, capacity=None, priority=None):
    num_tokens, top_k = ids.shape
    order = range(num_tokens)
    if priority is not None:
        served = priority.tolist()
        order = sorted(order, key=lambda t: (math.isnan(served[t]), 0.0 if math.isnan(served[t]) else -served[t]))
    choices = ids.tolist()
    slots = [[-1] * top_k for _ in range(num_tokens)]
    counts, first_choices = [0] * num_experts, [0] * num_experts
    for j in range(top_k):
        for t in order:
            expert = choices[t][j]
            if expert >= 0:
                slots[t][j] = counts[expert]
                counts[expert] += 1
                first_choices[expert] += j == 0
    limit = math.inf if capacity is None else capacity
    offsets = [0]
    for count in counts:
        offsets.append(offsets[-1] + min(count, limit))
    row_index = [[-1] * top_k for _ in range(num_tokens)]
    row_choice = [-1] * (num_tokens * top_k)
    for t in range(num_tokens):
        for j in range(top_k):
            if 0 <= slots[t][j] < limit:
                row_index[t][j] = offsets[choices[t][j]] + slots[t][j]
                row_choice[row_index[t][j]] = t * top_k + j
    return Assignment(
        torch.tensor(slots, dtype=torch.int32).reshape(num_tokens, top_k),
        torch.tensor(counts, dtype=torch.int64),
        torch.tensor(first_choices, dtype=torch.int64),
        torch.tensor(offsets, dtype=torch.int64),
        torch.tensor(row_index, dtype=torch.int64).reshape(num_tokens, top_k),
        torch.tensor(row_choice, dtype=torch.int64),
    )


def padded_rows(ids, slots, num_experts, capacity):
    row_index = torch.full(ids.shape, -1)
    row_choice = torch.full((num_experts * capacity,), -1)
    for choice, (expert, slot) in enumerate(zip(ids.flatten().tolist(), slots.flatten().tolist(), strict=True)):
        if expert >= 0 and 0 <= slot < capacity:
            row_index.view(-1)[choice] = expert * capacity + slot
            row_choice[expert * capacity + slot] = choice
    return row_index, row_choice


def gshard_loss(score_sums, first_choices, num_tokens, dtype):
    count = max(num_tokens, 1)
    shares = first_choices.to(score_sums.dtype) / count
    return len(first_choices) * ((score_sums / count).to(dtype) * shares.to(dtype)).sum()


# --- Rows and experts ------------------------------------------------------------------------------------------------


def _stack(rows, width, like):
    return torch.stack(rows) if rows else like.new_zeros((0, width))


def dispatch(tokens, row_choice, top_k, weights=None):
    rows = []
    for choice in row_choice.tolist():
        if choice < 0:
            rows.append(wide(tokens).new_zeros(tokens.shape[1]))
        else:
            weight = 1 if weights is None else weights.reshape(-1)[choice]
            rows.append(weight * wide(tokens)[choice // top_k])
    return _stack(rows, tokens.shape[1], wide(tokens)).to(tokens.dtype)


def combine(rows, row_index, weights=None):
    output = []
    for t, indices in enumerate(row_index.tolist()):
        total = wide(rows).new_zeros(rows.shape[1])
        for j, row in enumerate(indices):
            if row >= 0:
                total = total + (1 if weights is None else weights[t, j]) * wide(rows)[row]
        output.append(total)
    return _stack(output, rows.shape[1], wide(rows)).to(rows.dtype)


def _sum_of_products(left, right):
    total = left.new_zeros((left.shape[0], right.shape[1]))
    for i in range(left.shape[1]):
        total = total + left[:, i : i + 1] * right[i]
    return total


class _Product(torch.autograd.Function):
    """Its own, so that the gradients are summed as plainly as the product (autograd's sums are better than naive)."""

    @staticmethod
    def forward(ctx, left, right):
        ctx.save_for_backward(left, right)
        return _sum_of_products(left, right)

    @staticmethod
    def backward(ctx, grad):
        left, right = ctx.saved_tensors
        return _sum_of_products(grad, right.T), _sum_of_products(left.T, grad)


def product(left, right):
    """``left @ right`` with one accumulator an element, in the order of the inner dimension."""
    return _Product.apply(left, right)


def grouped_gemm(rows, weight, offsets, bias=None, *, transposed=False):
    bounds = offsets.tolist()
    outer = weight.shape[1 if transposed else 2]
    parts = []
    for e in range(weight.shape[0]):
        matrix = weight[e].T if transposed else weight[e]
        part = product(wide(rows)[bounds[e] : bounds[e + 1]], wide(matrix))
        parts.append(part if bias is None else part + wide(bias)[e])
    parts.append(wide(rows).new_zeros((rows.shape[0] - bounds[-1], outer)))
    return torch.cat(parts).to(rows.dtype)


# --- The layer -------------------------------------------------------------------------------------------------------


def make_layer(
    *,
    model_dim=6,
    num_experts=4,
    hidden_size=5,
    top_k=2,
    capacity_factor=1.0,
    dtype=None,
    gate=None,
    experts=None,
    **kw,
):
    kw.setdefault("seeds", (1, 2, 3))
    layer = moe.moe_layer(
        gate_type={"type": "top", "k": top_k, "capacity_factor": capacity_factor, **(gate or {})},
        model_dim=model_dim,
        experts={"count_per_node": num_experts, "hidden_size_per_expert": hidden_size, **(experts or {})},
        **kw,
    )
    return layer if dtype is None else layer.to(dtype)


def forward(layer, tokens, parameters=None, *, gate_index=0):
    """Output [T, D_out] and auxiliary loss of a layer that is a Python object, computed without its operators.

    Args:
        layer: Gives the options, and the parameters where none are given.
        tokens: [T, D].
        parameters: Values by their names in the state dict.
    """
    values = dict(layer.named_parameters()) if parameters is None else parameters
    gate, routing = layer.gates[gate_index], layer._routing[gate_index]
    gate_weight = values[f"gates.{gate_index}.wg.weight"]
    gate_dtype = torch.promote_types(gate_weight.dtype, torch.float32) if gate.fp32 else gate_weight.dtype
    logits = product(wide(tokens.to(gate_dtype)), wide(gate_weight.to(gate_dtype)).T).to(gate_dtype)
    (num_tokens, num_experts), top_k = logits.shape, routing.top_k
    chosen = select_experts(logits, top_k, normalize=routing.normalize)
    priority = chosen.top_scores if routing.prioritized else None
    counts = assign_rows(chosen.ids, num_experts, None, priority).tokens_per_expert.tolist()
    capacity = drop_threshold(routing.capacity_factor, num_tokens, num_experts, top_k, counts)
    plan = assign_rows(chosen.ids, num_experts, capacity, priority)

    weights = chosen.weights.to(accumulator(tokens.dtype))
    rows = dispatch(tokens, plan.row_choice, top_k, None if layer.is_postscore else weights)
    fc1, fc2 = values["experts.batched_fc1_w"], values["experts.batched_fc2_w"]
    biases = values.get("experts.batched_fc1_bias"), values.get("experts.batched_fc2_bias")
    hidden = grouped_gemm(rows.to(fc1.dtype), fc1, plan.offsets, biases[0], transposed=True)
    rows = grouped_gemm(layer.experts.config.activation(hidden), fc2, plan.offsets, biases[1]).to(tokens.dtype)
    output = combine(rows, plan.row_index, weights if layer.is_postscore else None)
    return output, gshard_loss(chosen.score_sums, plan.first_choices, num_tokens, logits.dtype)


# --- The error rule --------------------------------------------------------------------------------------------------


def exact_values(shape, dtype=torch.float64, *, seed=0, step=32):
    """Multiples of 1 / step between -2 and 2: they, and short sums of them, are exact in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(-2 * step, 2 * step + 1, shape, generator=generator) / step).to(dtype)


def exact_gates(layer):
    """Give the gates weights whose logits of :func:`exact_tokens` are exact in every dtype, in whatever order they
    are summed, so that all twins choose the same experts."""
    with torch.no_grad():
        for index, gate in enumerate(layer.gates):
            gate.wg.weight.copy_(exact_values(gate.wg.weight.shape, step=1, seed=index + 9) / 8)
    return layer


def exact_tokens(num_tokens, width, dtype=torch.float64, *, seed=0):
    return exact_values((num_tokens, width), dtype, step=2, seed=seed)


def random_values(shape, dtype=torch.float64, *, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def assert_close(what, ours, naive, exact, free=1):
    """|ours - exact| <= 2 * |naive - exact|, the largest error over all elements.

    The naive twin may be lucky, and in fp64 it is the reference itself, so some roundings of the largest value (of 1
    if all are smaller) are free, ``free`` times: one of the result's dtype, four of the accumulator's, 64 of fp64.
    """
    assert ours.dtype == naive.dtype, what
    assert ours.shape == naive.shape == exact.shape, what
    if ours.numel() == 0:
        return
    eps = torch.finfo(ours.dtype).eps
    roundings = max(eps, 4 * torch.finfo(accumulator(ours.dtype)).eps, 64 * torch.finfo(torch.float64).eps)
    floor = max(exact.abs().max().item(), 1.0) * roundings * free
    error, twin = ((value.double() - exact).abs().max().item() for value in (ours, naive))
    assert error <= max(2 * twin, floor), f"{what}: error {error:.3e}, naive twin {twin:.3e}, floor {floor:.3e}"


def assert_same_bits(what, left, right):
    assert left.dtype == right.dtype, what
    assert left.shape == right.shape, what
    as_int = {8: torch.int64, 4: torch.int32, 2: torch.int16}[left.element_size()]
    assert torch.equal(left.contiguous().view(as_int), right.contiguous().view(as_int)), f"{what}: bits differ"


def leaves(*tensors):
    """Copies that record gradients; None stays None."""
    return [None if tensor is None else tensor.detach().clone().requires_grad_() for tensor in tensors]


def gradients(output, arguments, *, seed=77):
    """Gradients of arguments (None for None) for an arbitrary gradient of the output; zero where nothing depends."""
    if output.requires_grad:
        output.backward(exact_values(output.shape, output.dtype, seed=seed))
    return [None if leaf is None else torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in arguments]
