"""Dispatch, combine and the experts' products against their naive twins: values and every gradient."""

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import DTYPES, accumulator, assert_close, gradients, leaves, random_values
from tutel.functional import combine, dispatch, grouped_gemm

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
repeatable = settings(max_examples=20)


def plan_of(num_tokens, num_experts, top_k, capacity, seed):
    ids = torch.randint(-1, num_experts, (num_tokens, top_k), generator=torch.Generator().manual_seed(seed))
    return reference.assign_rows(ids, num_experts, capacity)


def check(names, ours, twin, values, dtype):
    """Compare a function with its twin: its value and the gradients of the arguments that are not None."""
    results = []
    for function, cast in ((ours, dtype), (twin, dtype), (twin, torch.float64)):
        # Weights are in the accumulator's dtype; everything else is in the dtype under test.
        wanted = [cast if name != "weights" or cast == torch.float64 else accumulator(cast) for name in names]
        arguments = leaves(*(v if v is None else v.to(d) for v, d in zip(values, wanted, strict=True)))
        output = function(*arguments)
        results.append((output, gradients(output, arguments)))
    (output, grads), (naive, naive_grads), (exact, exact_grads) = results
    assert_close("output", output, naive, exact)
    for name, *compared in zip(names, grads, naive_grads, exact_grads, strict=True):
        if compared[2] is not None:
            assert_close(f"gradient of {name}", *compared)


@dtypes
@pytest.mark.parametrize("weighted", [False, True])
@repeatable
@given(st.integers(1, 30), st.integers(1, 6), st.integers(1, 6), st.integers(1, 70), st.none() | st.integers(1, 9))
def test_dispatch_and_combine(dtype, weighted, num_tokens, num_experts, top_k, width, capacity):
    plan = plan_of(num_tokens, num_experts, top_k, capacity, seed=width)
    # Weights and values are rounded to the dtype first, so that all twins start from the same numbers.
    weights = random_values((num_tokens, top_k), accumulator(dtype), seed=3) if weighted else None
    tokens = random_values((num_tokens, width), dtype, seed=1)
    rows = random_values((num_tokens * top_k, width), dtype, seed=2)
    check(
        ("tokens", "weights"),
        lambda tokens, weights: dispatch(tokens, plan.row_index, plan.row_choice, weights),
        lambda tokens, weights: reference.dispatch(tokens, plan.row_choice, top_k, weights),
        (tokens, weights),
        dtype,
    )
    check(
        ("rows", "weights"),
        lambda rows, weights: combine(rows, plan.row_index, plan.row_choice, weights),
        lambda rows, weights: reference.combine(rows, plan.row_index, weights),
        (rows, weights),
        dtype,
    )


def check_product(dtype, counts, tail, inner, outer, *, transposed, biased):
    offsets = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()])
    experts = len(counts)
    rows = random_values((int(offsets[-1]) + tail, inner), dtype, seed=1)
    shape = (experts, outer, inner) if transposed else (experts, inner, outer)
    weight = random_values(shape, dtype, seed=2)
    bias = random_values((experts, outer), dtype, seed=3) if biased else None
    check(
        ("rows", "weight", "bias"),
        lambda rows, weight, bias: grouped_gemm(rows, weight, offsets, bias, transposed=transposed),
        lambda rows, weight, bias: reference.grouped_gemm(rows, weight, offsets, bias, transposed=transposed),
        (rows, weight, bias),
        dtype,
    )


@dtypes
@pytest.mark.parametrize("transposed", [False, True])
@repeatable
@given(
    st.lists(st.integers(0, 20), min_size=1, max_size=5),
    st.integers(0, 4),
    st.integers(1, 40),
    st.integers(1, 40),
    st.booleans(),
)
def test_grouped_gemm(dtype, transposed, counts, tail, inner, outer, biased):
    check_product(dtype, counts, tail, inner, outer, transposed=transposed, biased=biased)


@dtypes
@pytest.mark.parametrize("transposed", [False, True])
def test_grouped_gemm_beyond_one_block(dtype, transposed):
    check_product(dtype, [0, 530, 1, 0], 3, 67, 301, transposed=transposed, biased=True)
    check_product(dtype, [3, 5], 0, 1100, 9, transposed=transposed, biased=False)


@dtypes
@pytest.mark.parametrize(
    ("experts", "rows", "inner", "outer"), [(1, 0, 3, 5), (4, 0, 0, 2), (2, 3, 0, 4), (2, 3, 4, 0), (0, 3, 4, 5)]
)
def test_empty_products(dtype, experts, rows, inner, outer):
    offsets = torch.zeros(experts + 1, dtype=torch.int64)
    if experts:
        offsets[1:] = rows
    x, w, b = leaves(*(torch.ones(s, dtype=dtype) for s in ((rows, inner), (experts, inner, outer), (experts, outer))))
    output = grouped_gemm(x, w, offsets, b)
    assert output.shape == (rows, outer)
    # Without inner values only the bias is left, and without experts nothing is.
    assert torch.equal(output, torch.full_like(output, inner + 1 if experts else 0))
    output.sum().backward()
    assert (x.grad.shape, w.grad.shape, b.grad.shape) == (x.shape, w.shape, b.shape)


def test_no_tokens_and_no_width():
    index, choice = torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    assert dispatch(torch.zeros(0, 3), index, choice).shape == (0, 3)
    assert combine(torch.zeros(0, 3), index, choice).shape == (0, 3)
    index, choice = torch.tensor([[0, -1]]), torch.tensor([0, -1])
    assert dispatch(torch.zeros(1, 0), index, choice).shape == (2, 0)
    assert combine(torch.zeros(2, 0), index, choice).shape == (1, 0)
