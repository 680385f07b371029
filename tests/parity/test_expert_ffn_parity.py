"""Experts computed in fused passes against the composition of their naive twins: values and every gradient."""

import functools

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import DTYPES, accumulator, assert_close, gradients, leaves, random_values
from torch import nn
from torch.nn import functional as F
from tutel.experts.activation import known_activation
from tutel.functional import ACTIVATIONS, Routes, expert_ffn

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
NAMES = ("tokens", "weights", "fc1", "fc2", "value", "fc1_bias", "fc2_bias")
DEFINITIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "identity": lambda x: x,
}


def twin(plan, top_k, activation, transposed, tokens, weights, fc1, fc2, value, fc1_bias, fc2_bias):
    dtype = tokens.dtype
    rows = tokens if weights is None else reference.dispatch(tokens, plan.row_choice, top_k)
    hidden = reference.grouped_gemm(rows, fc1, plan.offsets, fc1_bias, transposed=transposed)
    hidden = DEFINITIONS[activation](reference.wide(hidden)).to(dtype)
    if value is not None:
        hidden = hidden * reference.grouped_gemm(rows, value, plan.offsets, transposed=transposed)
    rows = reference.grouped_gemm(hidden, fc2, plan.offsets, fc2_bias)
    return rows if weights is None else reference.combine(rows, plan.row_index, weights)


def check(dtype, sizes, *, activation="relu", transposed=False, gated=False, biased=True, routed=True, capacity=None):
    num_tokens, num_experts, top_k, width, hidden, outer = sizes
    ids = torch.randint(-1, num_experts, (num_tokens, top_k), generator=torch.Generator().manual_seed(width))
    plan = reference.assign_rows(ids, num_experts, capacity)
    fc1 = (num_experts, hidden, width) if transposed else (num_experts, width, hidden)
    values = (
        random_values((num_tokens if routed else num_tokens * top_k, width), dtype, seed=1),
        random_values((num_tokens, top_k), accumulator(dtype), seed=2) if routed else None,
        random_values(fc1, dtype, seed=3),
        random_values((num_experts, hidden, outer), dtype, seed=4),
        random_values(fc1, dtype, seed=5) if gated else None,
        random_values((num_experts, hidden), dtype, seed=6) if biased else None,
        random_values((num_experts, outer), dtype, seed=7) if biased else None,
    )

    def ours(tokens, weights, fc1, fc2, value, fc1_bias, fc2_bias):
        routes = None if weights is None else Routes(ids.int(), weights, plan.row_index, plan.row_choice)
        return expert_ffn(
            tokens,
            fc1,
            fc2,
            plan.offsets,
            activation=activation,
            value=value,
            fc1_bias=fc1_bias,
            fc2_bias=fc2_bias,
            transposed=transposed,
            routes=routes,
        )

    naive = functools.partial(twin, plan, top_k, activation, transposed)
    results = []
    for function, cast in ((ours, dtype), (naive, dtype), (naive, torch.float64)):
        wanted = [cast if name != "weights" or cast == torch.float64 else accumulator(cast) for name in NAMES]
        arguments = leaves(*(v if v is None else v.to(d) for v, d in zip(values, wanted, strict=True)))
        output = function(*arguments)
        results.append((output, gradients(output, arguments)))
    (output, grads), (naive_output, naive_grads), (exact, exact_grads) = results
    # Activations are within a few roundings of their own.
    assert_close("output", output, naive_output, exact, free=4)
    for name, *compared in zip(NAMES, grads, naive_grads, exact_grads, strict=True):
        if compared[2] is not None:
            assert_close(f"gradient of {name}", *compared, free=4)


@dtypes
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True])
def test_activations(dtype, activation, gated):
    check(dtype, (9, 3, 2, 17, 13, 11), activation=activation, gated=gated)


@dtypes
@settings(max_examples=20)
@given(
    st.tuples(*(st.integers(1, most) for most in (20, 5, 4, 40, 40, 40))),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.none() | st.integers(1, 5),
)
def test_expert_ffn(dtype, sizes, transposed, gated, biased, routed, capacity):
    check(dtype, sizes, transposed=transposed, gated=gated, biased=biased, routed=routed, capacity=capacity)


@dtypes
@pytest.mark.parametrize("transposed", [False, True])
def test_hidden_units_beyond_one_tile(dtype, transposed):
    check(dtype, (9, 2, 2, 7, 2100, 5), transposed=transposed, gated=transposed)


@dtypes
@pytest.mark.parametrize("tokens", [0, 3])
def test_nothing_to_compute(dtype, tokens):
    ids = torch.full((tokens, 2), -1)
    plan = reference.assign_rows(ids, 4, None)
    x, fc1, fc2 = leaves(*(torch.ones(s, dtype=dtype) for s in ((tokens, 3), (4, 3, 5), (4, 5, 2))))
    weights = torch.ones(tokens, 2, dtype=accumulator(dtype), requires_grad=True)
    routes = Routes(ids.int(), weights, plan.row_index, plan.row_choice)
    output = expert_ffn(x, fc1, fc2, plan.offsets, activation="gelu", routes=routes)
    assert output.shape == (tokens, 2)
    assert not output.any()
    output.sum().backward()
    assert all(not leaf.grad.any() for leaf in (x, fc1, fc2, weights))


class Own(nn.ReLU):
    pass


def test_torch_functions_and_modules_are_recognised_and_nothing_else():
    known = {
        "relu": [F.relu, torch.relu, nn.ReLU(), nn.ReLU(inplace=True)],
        "silu": [F.silu, nn.SiLU()],
        "gelu": [F.gelu, nn.GELU(), functools.partial(F.gelu, approximate="none")],
        "gelu_tanh": [nn.GELU("tanh"), functools.partial(F.gelu, approximate="tanh")],
        "sigmoid": [torch.sigmoid, nn.Sigmoid()],
        "identity": [nn.Identity()],
    }
    for name, callables in known.items():
        for activation in callables:
            assert known_activation(activation) == name, activation
    hooked = nn.ReLU()
    hooked.register_forward_hook(lambda *_: None)
    opaque = [lambda x: F.relu(x), Own(), hooked, F.relu6, functools.partial(F.relu, inplace=True), F.leaky_relu]
    assert all(known_activation(activation) is None for activation in opaque)
    x = torch.linspace(-5, 5, 101, dtype=torch.float64)
    for name, callables in known.items():
        for activation in callables:
            torch.testing.assert_close(activation(x.clone()), DEFINITIONS[name](x))
