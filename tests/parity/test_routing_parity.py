"""Selection and assignment against their naive twins: values, gradients, ties, holes, priorities, capacity."""

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import DTYPES, assert_close, exact_values, leaves, random_values
from tutel.functional import accumulator_dtype, assign_rows, padded_rows, prefix_count, select_experts
from tutel.route import RoutePlan, drop_threshold

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def check_selection(logits, top_k, *, softmax, normalize):
    """Ids exactly, values and gradients by the error rule."""
    narrow, naive, exact = leaves(logits, logits, logits.double())
    eps = torch.finfo(logits.dtype).eps
    ours = select_experts(narrow, top_k, softmax=softmax, normalize=normalize)
    twins = [
        reference.select_experts(value, top_k, use_softmax=softmax, normalize=normalize, eps=eps)
        for value in (naive, exact)
    ]
    assert torch.equal(ours.ids.long(), twins[1].ids)
    assert ours.ids.dtype == torch.int32
    assert not ours.top_scores.requires_grad
    for name in ("weights", "top_scores", "score_sums"):
        assert getattr(ours, name).dtype == accumulator_dtype(logits.dtype)
        assert_close(name, *(getattr(selection, name) for selection in (ours, *twins)))

    upstream = random_values(ours.weights.shape, seed=1), random_values(ours.score_sums.shape, seed=2)
    upstream = [grad.to(ours.weights.dtype) for grad in upstream]
    for selection in (ours, *twins):
        grads = [grad.to(selection.weights.dtype) for grad in upstream]
        torch.autograd.backward([selection.weights, selection.score_sums], grads)
    assert narrow.grad.dtype == logits.dtype
    assert_close("gradient of the logits", narrow.grad, naive.grad, exact.grad)


@dtypes
@settings(max_examples=20)
@given(st.integers(0, 40), st.integers(1, 33), st.integers(1, 33), st.booleans(), st.integers(0, 9))
def test_selection(dtype, num_tokens, num_experts, top_k, normalize, seed):
    logits = random_values((num_tokens, num_experts), dtype, seed=seed)
    check_selection(logits, min(top_k, num_experts), softmax=True, normalize=normalize)


@dtypes
@pytest.mark.parametrize("top_k", range(1, 9))
def test_selection_from_scores_that_the_caller_made(dtype, top_k):
    scores = torch.softmax(random_values((11, 8)), dim=1).to(dtype)
    check_selection(scores, top_k, softmax=False, normalize=True)


@dtypes
@pytest.mark.parametrize("top_k", [1, 2, 7])
def test_selection_of_more_tokens_than_one_task_takes(dtype, top_k):
    check_selection(random_values((3000, 70), dtype), top_k, softmax=True, normalize=True)


@dtypes
def test_ties_go_to_the_lower_expert(dtype):
    logits = torch.zeros(3, 40, dtype=dtype)
    logits[1, 35] = logits[1, 20] = 1
    logits[2, 0] = -1
    ids = select_experts(logits, 3).ids
    assert ids.tolist() == [[0, 1, 2], [20, 35, 0], [1, 2, 3]]
    # Few distinct values: ties everywhere, also at the boundary of the choice.
    logits = exact_values((200, 21), dtype, step=1)
    for top_k in (1, 2, 5, 21):
        assert torch.equal(select_experts(logits, top_k).ids.long(), reference.top_ids(logits, top_k))


@dtypes
def test_large_logits_do_not_overflow(dtype):
    logits = torch.tensor([[3e4, -3e4, 2.9e4], [-6e4, -6e4, -6e4]]).to(dtype)
    check_selection(logits, 2, softmax=True, normalize=True)


@dtypes
def test_weights_whose_sum_is_tiny_are_divided_by_epsilon(dtype):
    scores = torch.tensor([[0.0, 0.0, 0.0], [torch.finfo(dtype).eps / 4, 0.0, 0.0]]).to(dtype)
    weights = select_experts(scores, 2, softmax=False).weights
    assert weights.tolist() == [[0, 0], [0.25, 0]]


# --- Assignment: integers, so equality -------------------------------------------------------------------------------


def check_assignment(ids, num_experts, capacity, priority=None):
    ours = assign_rows(ids.to(torch.int32), num_experts, capacity=capacity, priority=priority)
    naive = reference.assign_rows(ids, num_experts, capacity, priority)
    for name, found, expected in zip(ours._fields, ours, naive, strict=True):
        assert found.dtype == expected.dtype, name
        assert torch.equal(found, expected), name


@settings(max_examples=150)
@given(st.data())
def test_assignment(data):
    num_tokens, num_experts = data.draw(st.integers(0, 40)), data.draw(st.integers(1, 9))
    top_k = data.draw(st.integers(1, num_experts))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    lowest, skewed = data.draw(st.sampled_from([-1, 0])), data.draw(st.booleans())
    ids = torch.randint(lowest, num_experts, (num_tokens, top_k), generator=generator)
    if skewed:
        ids[torch.rand(ids.shape, generator=generator) < 0.8] = 0
    priority = None
    if data.draw(st.booleans()):
        # Few values, so that the order's stability shows; NaN comes last.
        priority = torch.randint(0, 4, (num_tokens,), generator=generator).float()
        priority[priority == 3] = torch.nan
        priority = priority.to(data.draw(st.sampled_from([torch.float32, torch.float64])))
    check_assignment(ids, num_experts, data.draw(st.none() | st.integers(0, 25)), priority)


def test_first_choices_come_before_second_ones_and_the_likeliest_token_first():
    # Worked by hand: three tokens, two experts, both chosen by all; room for two tokens an expert.
    ids = torch.tensor([[0, 1], [1, 0], [0, 1]], dtype=torch.int32)
    plan = assign_rows(ids, 2, capacity=2)
    assert plan.slots.tolist() == [[0, 1], [0, 2], [1, 2]]
    assert plan.row_index.tolist() == [[0, 3], [2, -1], [1, -1]]
    assert plan.row_choice.tolist() == [0, 4, 2, 1, -1, -1]
    assert plan.offsets.tolist() == [0, 2, 4]
    assert plan.tokens_per_expert.tolist() == [3, 3]
    assert plan.first_choices.tolist() == [2, 1]
    plan = assign_rows(ids, 2, capacity=2, priority=torch.tensor([0.5, 0.7, 0.9]))
    assert plan.slots.tolist() == [[1, 2], [0, 2], [0, 1]]
    assert plan.row_index.tolist() == [[1, -1], [2, -1], [0, 3]]


@pytest.mark.parametrize("factor", [0.0, 0.3, 1.0, 1.25, 7.5, -0.3, -1.0, -1.25, -100.0])
@pytest.mark.parametrize(("num_tokens", "num_experts", "top_k"), [(0, 3, 2), (1, 4, 1), (17, 5, 2), (64, 8, 8)])
def test_capacity_drops_what_the_specified_number_drops(factor, num_tokens, num_experts, top_k):
    ids = reference.top_ids(random_values((num_tokens, num_experts)), top_k).to(torch.int32)
    counts = assign_rows(ids, num_experts).tokens_per_expert.tolist()
    specified = reference.drop_threshold(factor, num_tokens, num_experts, top_k, counts)
    capacity = drop_threshold(factor, num_tokens, num_experts, top_k)
    ours = assign_rows(ids, num_experts, capacity=capacity)
    assert torch.equal(ours.row_index, reference.assign_rows(ids, num_experts, specified).row_index)
    if factor > 0:
        assert capacity == specified


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8], ids=str)
def test_plans_from_choices_of_any_integer_dtype(dtype):
    ids = torch.tensor([[0, -1], [2, 0], [-1, -1]]).to(dtype)
    plan = RoutePlan.from_topk(ids, torch.ones(3, 2), 3, capacity=1)
    assert plan.topk_ids.dtype == torch.int32
    assert plan.row_index.tolist() == [[0, -1], [1, -1], [-1, -1]]
    assert plan.tokens_per_expert.tolist() == [2, 0, 1]


@settings(max_examples=50)
@given(st.integers(0, 20), st.integers(1, 6), st.integers(1, 3), st.integers(0, 9), st.integers(0, 99))
def test_padded_rows(num_tokens, num_experts, top_k, capacity, seed):
    ids = torch.randint(-1, num_experts, (num_tokens, top_k), generator=torch.Generator().manual_seed(seed)).int()
    slots = reference.assign_rows(ids, num_experts).slots
    ours = padded_rows(ids, slots, num_experts, capacity)
    for found, expected in zip(ours, reference.padded_rows(ids, slots, num_experts, capacity), strict=True):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)


INTEGERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]


@pytest.mark.parametrize("dtype", [*INTEGERS, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (1, 1), (37, 5), (400, 130)])
def test_prefix_count(dtype, dim, shape):
    mask = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    for layout in (mask, mask.t().contiguous().t()):
        counts = prefix_count(layout, dim)
        expected = torch.cumsum(mask, dim) - 1
        assert counts.dtype == expected.dtype
        assert torch.equal(counts, expected)
