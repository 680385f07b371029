"""The whole layer against the naive reference: output, auxiliary loss and every gradient."""

import copy

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import DTYPES, assert_close, exact_gates, exact_tokens, exact_values, make_layer, random_values

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def run(function, layer, tokens):
    """Output, auxiliary loss, and the gradients of a loss of both, by name."""
    for parameter in layer.parameters():
        parameter.grad = None
    tokens = tokens.detach().clone().requires_grad_()
    output, l_aux = function(layer, tokens)
    loss_of = exact_values(output.shape, output.dtype, seed=5)
    (torch.sum(output * loss_of) + l_aux).backward()
    results = {"output": output.detach(), "l_aux": l_aux.detach(), "gradient of the tokens": tokens.grad}
    zeros = {name: torch.zeros_like(parameter) for name, parameter in layer.named_parameters()}
    results.update({f"gradient of {name}": p.grad for name, p in layer.named_parameters() if p.grad is not None})
    return {**{f"gradient of {name}": zero for name, zero in zeros.items()}, **results}


def ours(layer, tokens):
    output = layer(tokens)
    return output, output.l_aux


def check(layer, tokens, dtype):
    """The layer in a dtype, its naive twin there, and the naive twin in fp64 on the same values."""
    layer = layer.to(dtype)
    exact = run(reference.forward, copy.deepcopy(layer).double(), tokens.to(dtype).double())
    naive = run(reference.forward, layer, tokens.to(dtype))
    for name, value in run(ours, layer, tokens.to(dtype)).items():
        assert_close(name, value, naive[name], exact[name])


@dtypes
@pytest.mark.parametrize("is_postscore", [True, False])
@settings(max_examples=12)
@given(st.data())
def test_layer(dtype, is_postscore, data):
    draw = data.draw
    num_experts = draw(st.integers(1, 6), "experts")
    width = draw(st.integers(1, 17), "model_dim")
    layer = make_layer(
        model_dim=width,
        num_experts=num_experts,
        hidden_size=draw(st.integers(1, 13), "hidden_size"),
        top_k=draw(st.integers(1, num_experts), "top_k"),
        capacity_factor=draw(st.sampled_from([0.0, 0.5, 1.0, 2.0, -0.5, -1.0]), "capacity_factor"),
        experts={
            "has_fc1_bias": draw(st.booleans(), "fc1 bias"),
            "has_fc2_bias": draw(st.booleans(), "fc2 bias"),
            "output_dim": draw(st.none() | st.integers(1, 9), "output_dim"),
        },
        is_postscore=is_postscore,
        normalize_gate=draw(st.booleans(), "normalize"),
    )
    check(exact_gates(layer), exact_tokens(draw(st.sampled_from([0, 1, 2, 13, 30]), "tokens"), width), dtype)


@dtypes
@pytest.mark.parametrize("top_k", [1, 2, 3, 4, 5])
def test_every_top_k(dtype, top_k):
    layer = make_layer(model_dim=7, num_experts=5, hidden_size=9, top_k=top_k, capacity_factor=1.25)
    check(exact_gates(layer), exact_tokens(33, 7), dtype)


@dtypes
@pytest.mark.parametrize("capacity_factor", [0.0, 1.0])
def test_all_tokens_to_one_expert_while_others_stay_empty(dtype, capacity_factor):
    layer = make_layer(num_experts=4, top_k=2, capacity_factor=capacity_factor)
    with torch.no_grad():
        layer.gates[0].wg.weight.zero_()
        layer.gates[0].wg.weight[2] = 1 / 8
    tokens = exact_tokens(20, 6).abs() + 1
    check(layer, tokens, dtype)
    counts = [20, 0, 20, 0]  # the second choice is a tie of zeros, which the lowest expert wins
    assert layer.dispatch_count.tolist() == counts


@dtypes
def test_more_rows_than_one_block(dtype):
    layer = make_layer(model_dim=33, num_experts=3, hidden_size=65, top_k=2, capacity_factor=0.0)
    check(exact_gates(layer), exact_tokens(150, 33), dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("capacity_factor", [0.5, -0.75])
def test_prioritized(dtype, capacity_factor):
    # Continuous values: tokens of equal priority, whose order depends on rounding, do not occur.
    layer = make_layer(num_experts=5, capacity_factor=capacity_factor, batch_prioritized_routing=True).double()
    check(layer, random_values((40, 6)).float(), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_fp32_gate_of_a_half_layer(dtype):
    layer = exact_gates(make_layer(gate={"fp32_gate": True}))
    check(layer, exact_tokens(21, 6), dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_activations_that_are_not_relu(dtype):
    layer = make_layer(experts={"activation_fn": torch.nn.GELU()}, capacity_factor=0.0)
    check(exact_gates(layer), exact_tokens(21, 6), dtype)
