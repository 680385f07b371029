"""What a layer holds: seeds and initial values, parameters and their marks, its attributes, and how it is stored."""

import copy
import ctypes
import gc
import io
import pickle

import pytest
import torch
from reference import make_layer, random_values
from torch import nn

from tutel import moe

TOKENS = random_values((12, 6), torch.float32)
EXPERTS = {"count_per_node": 3, "hidden_size_per_expert": 5}


def values(layer):
    return {name: value.clone() for name, value in layer.state_dict().items()}


def assert_equal_state(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_initial_values_are_those_of_linear_layers_in_the_published_order(dtype):
    torch.set_default_dtype(dtype)
    layer = moe.moe_layer([{"k": 2}, {"k": 1}], 6, {**EXPERTS, "output_dim": 4}, seeds=(11, 22, 33))
    after = torch.get_rng_state()

    torch.manual_seed(22)
    for e in range(3):
        fc1, fc2 = nn.Linear(6, 5), nn.Linear(5, 4)
        assert torch.equal(layer.experts.batched_fc1_w[e], fc1.weight)
        assert torch.equal(layer.experts.batched_fc1_bias[e], fc1.bias)
        assert torch.equal(layer.experts.batched_fc2_w[e], fc2.weight.T)
        assert torch.equal(layer.experts.batched_fc2_bias[e], fc2.bias)
    for index in (0, 1):
        torch.manual_seed(11 + index)
        assert torch.equal(layer.gates[index].wg.weight, nn.Linear(6, 3, bias=False).weight)
    torch.manual_seed(33)
    assert torch.equal(torch.get_rng_state(), after)
    assert {parameter.dtype for parameter in layer.parameters()} == {dtype}


def test_seeds_reproduce_and_may_be_left_out():
    assert_equal_state(values(make_layer(seeds=(1, 2, 3))), values(make_layer(seeds=(1, 2, 4))))
    assert_equal_state(values(make_layer(seeds=(1, 2))), values(make_layer(seeds=[1, 2, None])))
    assert not torch.equal(make_layer(seeds=(1, 2)).gates[0].wg.weight, make_layer(seeds=(2, 2)).gates[0].wg.weight)
    one, other = make_layer(seeds=(1, 2)).experts, make_layer(seeds=(1, 3)).experts
    assert not torch.equal(one.batched_fc1_w, other.batched_fc1_w)
    # Without seeds the caller's generator is used, and goes on.
    torch.manual_seed(5)
    first, second = make_layer(seeds=None), make_layer(seeds=None)
    torch.manual_seed(5)
    assert_equal_state(values(first), values(make_layer(seeds=None)))
    assert not torch.equal(first.gates[0].wg.weight, second.gates[0].wg.weight)


def test_forward_leaves_the_generator_alone():
    layer = make_layer()
    state = torch.get_rng_state()
    layer(TOKENS)
    assert torch.equal(torch.get_rng_state(), state)


def test_state_dict():
    layer = moe.moe_layer([{"k": 2}, {"k": 1}], 6, {**EXPERTS, "output_dim": 4})
    shapes = {name: list(value.shape) for name, value in layer.state_dict().items()}
    assert shapes == {
        "_num_global_experts": [],
        "experts.batched_fc1_w": [3, 5, 6],
        "experts.batched_fc2_w": [3, 5, 4],
        "experts.batched_fc1_bias": [3, 5],
        "experts.batched_fc2_bias": [3, 4],
        "gates.0.wg.weight": [3, 6],
        "gates.1.wg.weight": [3, 6],
    }
    assert layer.state_dict()["_num_global_experts"].item() == 3
    assert layer.state_dict()["_num_global_experts"].dtype == torch.int64
    no_bias = moe.moe_layer({}, 6, {**EXPERTS, "has_fc1_bias": False, "has_fc2_bias": False})
    assert not [name for name in no_bias.state_dict() if "bias" in name]


def test_save_and_load():
    layer, other = make_layer(seeds=(1, 2, 3)), make_layer(seeds=(4, 5, 6))
    layer(TOKENS).sum().backward()
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file))
    assert_equal_state(values(layer), values(other))
    assert torch.equal(layer(TOKENS), other(TOKENS))


@pytest.mark.parametrize("store", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_after_a_step(store):
    layer = make_layer(capacity_factor=1.5)
    (layer(TOKENS).sum() + layer.l_aux).backward()
    copied = store(layer)
    assert_equal_state(values(layer), values(copied))
    assert torch.equal(copied(TOKENS), layer(TOKENS))
    assert copied.gates[0].capacity_factor == 1.5
    assert all(hasattr(parameter, "_tutel_expert") for parameter in copied.experts.parameters())
    with torch.no_grad():
        copied.gates[0].wg.weight.zero_()
    assert layer.gates[0].wg.weight.ne(0).any(), "the copy is its own"


def test_expert_parameters_are_marked_and_scanned():
    seen = []
    layer = make_layer(scan_expert_func=lambda name, parameter: seen.append((name, parameter)))
    names = ["batched_fc1_w", "batched_fc2_w", "batched_fc1_bias", "batched_fc2_bias"]
    assert [name for name, _ in seen] == names
    assert all(parameter is getattr(layer.experts, name) for name, parameter in seen)
    marked = [name for name, parameter in layer.named_parameters() if getattr(parameter, "_tutel_expert", False)]
    assert sorted(marked) == sorted(f"experts.{name}" for name in names)


def test_parameter_iterators():
    layer = moe.moe_layer([{"k": 2}, {"k": 1}], 6, EXPERTS)
    assert [name for name, _ in layer.get_parameter_iterator("gate")] == ["0.wg.weight", "1.wg.weight"]
    experts = dict(layer.get_parameter_iterator("local_experts"))
    assert set(map(id, experts.values())) == set(map(id, layer.experts.parameters()))
    with pytest.raises(ValueError, match="must be 'gate' or 'local_experts', got 'experts'"):
        layer.get_parameter_iterator("experts")


def test_attributes():
    layer = make_layer(num_experts=4, top_k=2, capacity_factor=1.25, gate={"gate_noise": 0.5})
    assert (layer.num_global_experts, layer.num_local_experts, layer.sharded_count, layer.world_size) == (4, 4, 1, 1)
    assert (layer.model_dim, layer.valid_rs, layer.group) == (6, [0, 1], None)
    gate = layer.gates[0]
    assert (gate.top_k, gate.capacity_factor, gate.gate_noise) == (2, 1.25, 0.5)
    assert moe.moe_layer.global_expert_count(3) == 3
    assert layer.l_aux is None
    output = layer(TOKENS)
    assert output.l_aux is layer.l_aux
    assert layer.dispatch_count.dtype == torch.int64
    assert int(layer.dispatch_count.sum()) == 24
    assert repr(layer)


def test_result_func():
    layer = make_layer(result_func=lambda output: (output, output.l_aux))
    output, l_aux = layer(TOKENS)
    assert torch.equal(output, make_layer()(TOKENS))
    assert l_aux is layer.l_aux


def test_frozen_parameters_get_no_gradient():
    layer = make_layer()
    layer.experts.batched_fc2_bias.requires_grad = False
    layer.gates[0].wg.weight.requires_grad = False
    output = layer(TOKENS)
    (output.sum() + output.l_aux).backward()
    assert layer.experts.batched_fc2_bias.grad is None
    assert layer.gates[0].wg.weight.grad is None
    assert layer.experts.batched_fc1_w.grad is not None


def test_layer_used_twice_in_one_forward():
    layer = make_layer(dtype=torch.float64, capacity_factor=0.0)
    tokens = random_values((12, 6)).requires_grad_()
    inner = layer(tokens)
    first = layer.l_aux
    outer = layer(inner)
    second = layer.l_aux
    (outer.sum() + first + second).backward()
    twin = copy.deepcopy(layer)
    expected = []
    for leaf in (tokens.detach().clone().requires_grad_(),):
        middle = twin(leaf)
        aux = twin.l_aux
        twin.zero_grad()
        cut = middle.detach().requires_grad_()
        (twin(cut).sum() + twin.l_aux).backward()
        torch.autograd.backward([middle, aux], [cut.grad, torch.ones_like(aux)])
        expected.append(leaf.grad)
    torch.testing.assert_close(tokens.grad, expected[0])
    for found, wanted in zip(layer.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(found.grad, wanted.grad)


def test_training_reduces_the_loss():
    layer = make_layer(capacity_factor=0.0)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)
    target = random_values((12, 6), torch.float32, seed=3)
    losses = []
    for _ in range(60):
        output = layer(TOKENS)
        loss = (output - target).square().mean() + 0.01 * output.l_aux
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


class _Heap(ctypes.Structure):
    """glibc's ``struct mallinfo2``."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in [
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        ]
    ]


def allocated_bytes():
    """What is in use now. The process's size would not do: what it keeps of freed memory depends on the allocator."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        pytest.skip("needs glibc 2.33 or newer to count allocated bytes")
    libc.mallinfo2.restype = _Heap
    heap = libc.mallinfo2()
    return heap.uordblks + heap.hblkhd


@pytest.mark.parametrize("accumulate", [False, True])
def test_a_thousand_steps_in_flat_memory(accumulate):
    torch.set_num_threads(1)  # small operators: threads that wait for each other would take most of the time
    layer = make_layer(model_dim=32, hidden_size=64)
    tokens = random_values((256, 32), torch.float32)
    kept = []

    def steps(count):
        for _ in range(count):
            output = layer(tokens)
            (output.sum() + layer.l_aux).backward()
            if accumulate:
                kept.append(layer.l_aux)

    steps(100)
    gc.collect()
    before = allocated_bytes()
    steps(1000)
    gc.collect()
    grown = (allocated_bytes() - before) / 1000
    # Rows alone are 64 KB a step. A kept l_aux has its own graph's empty nodes, which torch's own operators leave too.
    assert grown < (16_000 if accumulate else 500), f"{grown} bytes a step"
