"""What a training step allocates: no counts of T x E in int64, and no padded rows unless experts ask for them."""

import pytest
import torch
from matrix import cases, user
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tutel import moe

# Sizes, and products of them, that differ from all others.
T, E, K, D, H = 1013, 11, 2, 37, 53
FACTOR = 0.5
CAPACITY = K * int(FACTOR * -(-T // E))
MASK = T * E
PADDED = E * CAPACITY * D

FFN = {"num_experts_per_device": E, "hidden_size_per_expert": H}
RAGGED = {
    "ffn": FFN,
    "no bias, other width": {**FFN, "has_fc1_bias": False, "has_fc2_bias": False, "output_dim": 29},
    "fc1_copies": {**FFN, "fc1_copies": 2, "activation_fn": user.gated},
    "with self": {**FFN, "activation_fn_with_self": user.scaled_by_bias},
    "dropout": {**FFN, "implicit_dropout_p": 0.1},
    "llama_ffn": {**FFN, "type": "llama_ffn"},
    "modules": [user.Expert(D, H) for _ in range(E)],
}
PADDED_KINDS = {
    "custom": {"type": "custom", "module": user.Experts, "num_experts_per_device": E, "hidden_size": H},
    "fused": {**FFN, "fused_custom_fn": user.fused},
    "attention": {"type": "attention", "num_experts_per_device": E, "attention_fn": user.linear_attention},
}
GATES = {
    "top": {"type": "top", "k": K},
    "noise": {"type": "top", "k": K, "gate_noise": 1.0},
    "prioritized": {"type": "top", "k": K, "batch_prioritized_routing": True},
    "cosine_top": {"type": "cosine_top", "k": K, "proj_dim": 31},
    "custom": {"type": "custom", "module": user.Gate, "top_k": K},
}


class Allocations(TorchDispatchMode):
    """Every tensor that an operator returns, views included."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        tensors = [value for value in tree_leaves(result) if isinstance(value, torch.Tensor)]
        self.seen += [(str(function), tuple(value.shape), value.dtype) for value in tensors]
        return result


def training_step(gate, experts, **options):
    torch.manual_seed(1)
    layer = moe.moe_layer({"capacity_factor": FACTOR, **gate}, D, experts, **options)
    tokens = torch.randn(T, D, requires_grad=True)
    with Allocations() as allocations:
        output = layer(tokens)
        (output.square().sum() + layer.l_aux).backward()
    seen = allocations.seen
    assert any(name.startswith("tutel.") for name, *_ in seen), "operators in backward and forward are seen"
    assert any("weight_grad" in name or "bmm" in name or "mm" in name for name, *_ in seen)
    return seen


def integers_of(seen, size):
    """Tensors of integers that hold size x 8 bytes or more."""
    return [entry for entry in seen if not entry[2].is_floating_point and volume(entry) * entry[2].itemsize >= size * 8]


def volume(entry):
    return torch.Size(entry[1]).numel()


def test_sizes_differ():
    rows, weights = [T * D, T * K * D, T * K * H, T * K * 2 * H, T * K * 29], [E * H * D, 2 * E * H * D, E * H * 29]
    sizes = [*rows, *weights, PADDED, E * 3 * D * D, E * CAPACITY * 3 * D]
    assert len(set(sizes)) == len(sizes)
    assert max(T * K, E * CAPACITY) < MASK


@pytest.mark.parametrize("experts", RAGGED)
@pytest.mark.parametrize("is_postscore", [True, False])
def test_ragged_experts(experts, is_postscore):
    seen = training_step(GATES["top"], RAGGED[experts], is_postscore=is_postscore)
    assert integers_of(seen, MASK) == []
    assert [entry for entry in seen if volume(entry) == PADDED] == []
    assert [entry for entry in seen if entry[1][:2] == (E, CAPACITY)] == []


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("loss", ["gshard", "load-importance"])
def test_gates(gate, loss):
    options = {} if loss == "gshard" else {"is_gshard_loss": False}
    noise = {} if loss == "gshard" else {"gate_noise": 1.0}
    seen = training_step({**GATES[gate], **noise}, FFN, **options)
    assert integers_of(seen, MASK) == []
    assert [entry for entry in seen if volume(entry) == PADDED] == []


@pytest.mark.parametrize("factor", [0.0, -0.5, 4.0])
def test_no_rows_beyond_the_choices(factor):
    """Without a capacity, and with one that holds more than all choices, there are T x K rows."""
    seen = training_step({**GATES["top"], "capacity_factor": factor}, FFN)
    assert integers_of(seen, MASK) == []
    assert max(volume(entry) for entry in seen) == T * K * max(D, H)


@pytest.mark.parametrize("experts", PADDED_KINDS)
def test_padded_experts(experts):
    seen = training_step(GATES["top"], PADDED_KINDS[experts])
    assert any(entry[1] == (E, CAPACITY, D) for entry in seen)
    assert integers_of(seen, MASK) == []


def test_dropless_padded_experts_have_as_many_rows_as_the_fullest():
    torch.manual_seed(2)
    layer = cases.make_layer("top", "custom", capacity="dropless")
    tokens = cases.clear_tokens(layer)
    with Allocations() as allocations:
        layer(tokens)
    rows = int(layer.dispatch_count.max())
    assert any(entry[1] == (cases.EXPERTS, rows, cases.MODEL_DIM) for entry in allocations.seen)


def test_megatron_moves_no_rows():
    torch.manual_seed(1)
    layer = moe.moe_layer({"type": "megatron"}, D, {"hidden_size_per_expert": H})
    with Allocations() as allocations:
        layer(torch.randn(T, D)).sum().backward()
    assert not [name for name, *_ in allocations.seen if "dispatch" in name or "combine" in name or "assign" in name]
