"""NaN and infinity: they stay with their token, ids stay in range, other tokens keep their bits."""

import pytest
import torch
from reference import DTYPES, assert_same_bits, make_layer, random_values
from tutel.functional import assign_rows, combine, dispatch, grouped_gemm, select_experts

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
values = pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])


@dtypes
@values
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_selection(dtype, value, top_k):
    logits = random_values((6, 20), dtype)
    clean = select_experts(logits, top_k)
    marked_logits = logits.clone()
    marked_logits[2, 17] = value
    marked = select_experts(marked_logits, top_k)
    others = torch.arange(6) != 2
    assert torch.equal(marked.ids[others], clean.ids[others])
    assert_same_bits("weights", marked.weights[others], clean.weights[others])
    assert_same_bits("top scores", marked.top_scores[others], clean.top_scores[others])
    assert sorted(set(marked.ids[2].tolist())) == sorted(marked.ids[2].tolist()), "distinct"
    assert marked.ids.min() >= 0
    assert marked.ids.max() < 20
    if value == float("-inf"):
        assert 17 not in marked.ids[2]
        assert marked.weights.isfinite().all()
    else:
        assert marked.ids[2, 0] == 17
        assert marked.weights[2].isnan().all()


@dtypes
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("top_k", [1, 3, 20])
def test_rows_of_nothing_else(dtype, value, top_k):
    logits = torch.full((3, 20), value).to(dtype).requires_grad_()
    chosen = select_experts(logits, top_k)
    assert chosen.ids.tolist() == [list(range(top_k))] * 3
    assert chosen.weights.isnan().all()
    chosen.weights.sum().backward()
    assert logits.grad.isnan().all()


@dtypes
def test_gradient_of_the_logits_stays_with_its_token(dtype):
    logits = random_values((4, 6), dtype)
    marked = logits.clone()
    marked[1, 3] = torch.nan
    grads = []
    for leaf in (logits.requires_grad_(), marked.requires_grad_()):
        chosen = select_experts(leaf, 2)
        (chosen.weights * random_values((4, 2), chosen.weights.dtype)).sum().backward()
        grads.append(leaf.grad)
    others = torch.arange(4) != 1
    assert_same_bits("gradient", grads[0][others], grads[1][others])
    assert grads[1][1].isnan().all()


@dtypes
@values
def test_rows(dtype, value):
    ids = torch.tensor([[0, 2], [1, 0], [2, 1], [0, 1]], dtype=torch.int32)
    plan = assign_rows(ids, 3)
    tokens, weight = random_values((4, 5), dtype), random_values((3, 5, 7), dtype)
    marked = tokens.clone()
    marked[1, 2] = value
    results = []
    for given in (tokens, marked):
        rows = dispatch(given, plan.row_index, plan.row_choice)
        results.append(combine(grouped_gemm(rows, weight, plan.offsets), plan.row_index, plan.row_choice))
    others = torch.arange(4) != 1
    assert_same_bits("tokens", results[0][others], results[1][others])
    assert not results[1][1].isfinite().any()


@dtypes
@values
@pytest.mark.parametrize("is_postscore", [True, False])
def test_layer(dtype, value, is_postscore):
    layer = make_layer(capacity_factor=0.0, dtype=dtype, is_postscore=is_postscore)
    tokens = random_values((12, 6), dtype)
    marked = tokens.clone()
    marked[5, 1] = value
    expected = layer(tokens.requires_grad_())
    expected.sum().backward()
    output = layer(marked.requires_grad_())
    others = torch.arange(12) != 5
    assert_same_bits("output", output[others], expected[others])
    assert output[5].isnan().all()
    assert not layer.l_aux.isfinite()
    output.sum().backward()
    assert_same_bits("gradient of a token beside it", marked.grad[others], tokens.grad[others])


def test_nan_weights_do_not_reach_other_tokens_through_dropped_choices():
    plan = assign_rows(torch.zeros(3, 1, dtype=torch.int32), 1, capacity=1)
    weights = torch.tensor([[1.0], [torch.nan], [torch.inf]])
    output = combine(torch.ones(3, 2), plan.row_index, plan.row_choice, weights)
    assert output.tolist() == [[1, 1], [0, 0], [0, 0]]


def test_values_that_overflow_half_become_infinite_not_wrong():
    rows, weight = torch.full((1, 4), 300.0).half(), torch.full((1, 4, 1), 300.0).half()
    assert grouped_gemm(rows, weight, torch.tensor([0, 1])).item() == float("inf")
    # Sums are kept in fp32: what overflows on the way but not in the end is right.
    rows[0, 2:] *= -1
    assert grouped_gemm(rows, weight, torch.tensor([0, 1])).item() == 0
