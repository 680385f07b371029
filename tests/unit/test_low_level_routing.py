"""top_k_routing and its plan against one-hot masks and running counts; the functions that read a plan; both losses."""

import dataclasses
import math

import pytest
import torch
from reference import DTYPES, accumulator, random_values, top_ids, wide
from tutel.impls import fast_dispatch, losses
from tutel.route import RoutePlan

from tutel import losses as layer_losses
from tutel import moe

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
NUM_TOKENS, NUM_EXPERTS = 22, 5


def scores_of(num_tokens=NUM_TOKENS, num_experts=NUM_EXPERTS, dtype=torch.float64, *, skew=1.5):
    """Scores that prefer the first experts, so that some are full and some are empty."""
    logits = random_values((num_tokens, num_experts), seed=4) - skew * torch.arange(num_experts)
    return torch.softmax(logits, 1).to(dtype)


def naive_slots(ids, scores, *, prioritized):
    """Running counts of a one-hot mask over the choices in their order of service."""
    order = torch.argsort(scores.amax(1), descending=True, stable=True) if prioritized else torch.arange(len(scores))
    served = ids[order].T.reshape(-1)
    mask = torch.nn.functional.one_hot(served, scores.shape[1])
    slots = (((mask.cumsum(0) - 1) * mask).sum(1)).reshape(ids.shape[1], -1).T
    return torch.empty_like(slots).index_copy_(0, order, slots), mask.sum(0)


@dtypes
@pytest.mark.parametrize("top_k", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("prioritized", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_contents_of_the_plan(dtype, top_k, prioritized, normalize):
    scores = scores_of(dtype=dtype)
    critical, loss = moe.top_k_routing(
        scores, top_k, batch_prioritized_routing=prioritized, normalize_gate=normalize, capacity_factor=1.25
    )
    num_experts, ids, slots, weights, capacity, counts = critical
    top_k = min(top_k, NUM_EXPERTS)
    expected_ids = top_ids(wide(scores), top_k)
    expected_slots, expected_counts = naive_slots(expected_ids, scores, prioritized=prioritized)
    assert num_experts == NUM_EXPERTS
    assert type(capacity) is int
    assert capacity == top_k * int(1.25 * math.ceil(NUM_TOKENS / NUM_EXPERTS))
    for column in (ids, slots, weights):
        assert type(column) is list
        assert [tuple(part.shape) for part in column] == [(NUM_TOKENS,)] * top_k
        assert all(part.is_contiguous() for part in column)
    assert {part.dtype for part in (*ids, *slots)} == {torch.int32}
    assert torch.equal(torch.stack(ids, 1).long(), expected_ids)
    assert torch.equal(torch.stack(slots, 1).long(), expected_slots)
    assert counts.tolist() == expected_counts.tolist()
    assert counts.topk_ids.dtype == torch.int64
    assert torch.equal(counts.topk_ids, expected_ids)
    chosen = wide(scores).gather(1, expected_ids)
    if normalize and top_k > 1:
        chosen = chosen / chosen.sum(1, keepdim=True).clamp(min=torch.finfo(dtype).eps)
    torch.testing.assert_close(torch.stack(weights, 1), chosen)
    assert loss.shape == ()
    assert loss.dtype == dtype


def test_by_hand():
    scores = torch.tensor([[0.6, 0.3, 0.1], [0.5, 0.1, 0.4], [0.2, 0.2, 0.6], [0.7, 0.2, 0.1]], requires_grad=True)
    critical, loss = moe.top_k_routing(scores, top_k=2)
    # C = 2 * int(1.0 * ceil(4 / 3)); ties go to the lower id; all first choices are served before the second ones.
    assert critical[0] == 3
    assert critical[4] == 4
    assert [c.tolist() for c in critical[1]] == [[0, 0, 2, 0], [1, 2, 0, 1]]
    assert [c.tolist() for c in critical[2]] == [[0, 1, 0, 2], [0, 1, 3, 1]]
    torch.testing.assert_close(critical[3][1], torch.tensor([0.3 / 0.9, 0.4 / 0.9, 0.2 / 0.8, 0.2 / 0.9]))
    assert critical[5].tolist() == [4, 2, 2]
    # 3 / 4^2 * (2.0 * 3 + 0.8 * 0 + 1.2 * 1)
    assert loss.item() == pytest.approx(3 / 16 * 7.2)
    loss.backward()
    assert scores.grad.tolist() == [[pytest.approx(3 / 16 * n) for n in (3, 0, 1)]] * 4
    assert moe.get_reversed_sample_ids(critical).tolist() == [[0, 1, 3, 2], [0, 3, -1, -1], [2, 1, -1, -1]]
    assert moe.get_reversed_sample_ids(critical, "top_id").tolist() == [[0, 0, 0, 1], [1, 1, -1, -1], [0, 1, -1, -1]]


@pytest.mark.parametrize("factor", [0.3, 1, 1.25, 4.0, 0, 0.0, -0.3, -1.0, -9.0])
@pytest.mark.parametrize("alignment", [1, 4, 64])
@pytest.mark.parametrize("prioritized", [False, True])
@pytest.mark.parametrize("top_k", [1, 2])
def test_capacity(factor, alignment, prioritized, top_k):
    scores = scores_of()
    critical, _ = moe.top_k_routing(
        scores, top_k, capacity_factor=factor, alignment=alignment, batch_prioritized_routing=prioritized
    )
    needed = torch.bincount(top_ids(scores, top_k).reshape(-1)).max().item()
    bound = top_k * int(abs(factor) * math.ceil(NUM_TOKENS / NUM_EXPERTS))
    unaligned = bound if factor > 0 else needed if factor == 0 else min(needed, bound)
    assert critical[4] == math.ceil(unaligned / alignment) * alignment
    kept = (moe.get_reversed_sample_ids(critical) >= 0).sum(1)
    assert kept.tolist() == critical[5].clamp(max=critical[4]).tolist()


@pytest.mark.parametrize("factor", [1.0, 0.0, -1.0])
def test_no_tokens(factor):
    scores = torch.zeros(0, 4, requires_grad=True)
    critical, loss = moe.top_k_routing(scores, 2, capacity_factor=factor)
    assert (critical[4], loss.item()) == (0, 0)
    assert [part.shape for part in critical[1]] == [(0,)] * 2
    x = torch.zeros(0, 3, requires_grad=True)
    output = moe.fast_decode(moe.fast_encode(x, critical), critical)
    assert output.shape == (0, 3)
    (output.sum() + loss).backward()
    assert x.grad.shape == (0, 3)
    aligned, _ = moe.top_k_routing(scores, 2, capacity_factor=factor, alignment=8)
    assert moe.fast_encode(x, aligned).shape == (4, aligned[4], 3)


def test_nan_keeps_to_its_token():
    scores = scores_of(8, 4, torch.float32)
    scores[3] = math.nan
    critical, _ = moe.top_k_routing(scores, 2, capacity_factor=0)
    output = moe.fast_decode(moe.fast_encode(torch.ones(8, 2), critical), critical)
    assert output.isnan().any(1).tolist() == [t == 3 for t in range(8)]


def test_loss_function():
    scores, seen = scores_of(), []

    def loss_fn(scores, topk_ids):
        seen.append((scores, topk_ids))
        return "whatever it returns"

    critical, loss = moe.top_k_routing(scores, 2, loss_fn)
    assert loss == "whatever it returns"
    assert seen[0][0] is scores
    assert torch.equal(seen[0][1], moe.get_topk_selection(critical)[0])
    assert moe.top_k_routing(scores, 2, loss_fn=None)[1] is None
    assert torch.equal(moe.top_k_routing(scores, 2)[1], losses.gshard_loss(scores, seen[0][1]))


def test_plan_readers():
    critical, _ = moe.top_k_routing(scores_of(), 3, capacity_factor=0)
    ids, counts = moe.get_topk_selection(critical)
    assert torch.equal(ids, torch.stack(critical[1], 1).long())
    assert counts is critical[5] is moe.get_dispatch_count(critical) is fast_dispatch.get_dispatch_count(critical)
    assert counts.tolist() == torch.bincount(ids.reshape(-1), minlength=NUM_EXPERTS).tolist()
    copied = (*critical[:5], counts.clone())
    assert torch.equal(moe.get_topk_selection(copied)[0], ids)

    sample, top = (moe.get_reversed_sample_ids(critical, return_id_type=kind) for kind in ("sample_id", "top_id"))
    assert sample.dtype == top.dtype == torch.int32
    assert sample.shape == top.shape == (NUM_EXPERTS, critical[4])
    for expert in range(NUM_EXPERTS):
        for slot in range(critical[4]):
            token, choice = int(sample[expert, slot]), int(top[expert, slot])
            if slot >= counts[expert]:
                assert (token, choice) == (-1, -1)
            else:
                assert (int(critical[1][choice][token]), int(critical[2][choice][token])) == (expert, slot)


def test_names_of_arguments_that_programs_pass():
    critical, _ = moe.top_k_routing(
        scores=scores_of(), top_k=1, loss_fn=None, capacity_factor=1.0, batch_prioritized_routing=False,
        normalize_gate=True, alignment=1, group=None, inequivalent_tokens=True,
    )  # fmt: skip
    rows = moe.fast_encode(data=torch.ones(NUM_TOKENS, 2), critial_data=critical, is_postscore=True)
    assert moe.fast_decode(data=rows, critial_data=critical[:5]).shape == (NUM_TOKENS, 2)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int8, torch.bool, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(37, 5), (0, 5), (3, 0)])
def test_fast_cumsum_sub_one(dim, dtype, shape):
    mask = (random_values(shape) > 0).to(dtype)
    expected = torch.cumsum(mask, dim) - 1
    counts = moe.fast_cumsum_sub_one(mask, dim)
    assert counts.dtype == expected.dtype
    assert torch.equal(counts, expected)
    assert torch.equal(moe.fast_cumsum_sub_one(mask.T, dim=1 - dim), expected.T)


@dtypes
@pytest.mark.parametrize("num_tokens", [0, 1, 22, 3000])
def test_gshard_loss(dtype, num_tokens):
    scores = scores_of(num_tokens, dtype=dtype).requires_grad_()
    ids = top_ids(scores.detach().double(), 2)
    ours = losses.gshard_loss(scores, ids)
    if num_tokens:
        counts = torch.bincount(ids[:, 0], minlength=NUM_EXPERTS).double()
        exact = (scores.detach().double().mean(0) * counts / num_tokens).sum() * NUM_EXPERTS
        torch.testing.assert_close(ours.detach().double(), exact, rtol=8 * torch.finfo(dtype).eps, atol=0)
    else:
        assert ours.item() == 0
    ours.backward()
    assert scores.grad.isfinite().all()
    # It is the layer's own loss.
    plan = RoutePlan.from_topk(ids, torch.ones(ids.shape), NUM_EXPERTS)
    sums = scores.detach().sum(0, dtype=accumulator(dtype))
    layers = layer_losses.gshard_loss(dataclasses.replace(plan, score_sums=sums), dtype)
    torch.testing.assert_close(ours, layers, rtol=1e-6, atol=0)


def test_gshard_loss_passes_over_missing_choices():
    scores = scores_of(4, 3)
    loss = losses.gshard_loss(scores, torch.tensor([[-1], [2], [-1], [2]], dtype=torch.int32))
    torch.testing.assert_close(loss, 3 * scores[:, 2].mean() * 2 / 4)


def test_load_importance_loss_by_hand():
    scores = torch.tensor([[0.75, 0.25], [0.5, 0.5]], requires_grad=True)
    topk_logits = torch.tensor([[1.0, 0.25], [0.5, 0.5]], requires_grad=True)
    # Thresholds 0.25 and 0.5, deviation 1 / 2: load = [Phi(1) + Phi(0), Phi(0) + Phi(0)], importance = [1.25, 0.75].
    phi = 0.5 * (1 + math.erf(1 / math.sqrt(2)))
    load = [phi + 0.5, 1.0]
    mean = sum(load) / 2
    cv2_load = ((load[0] - mean) ** 2 + (load[1] - mean) ** 2) / (mean**2 + 1e-10)
    loss = losses.load_importance_loss(scores, topk_logits, 2, 1.0)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx((0.125 / (1 + 1e-10) + cv2_load) / 2, rel=1e-5)
    loss.backward()
    assert topk_logits.grad[:, 0].abs().max() == 0
    assert topk_logits.grad[:, 1].abs().max() > 0
    assert scores.grad.abs().max() > 0


def test_load_importance_loss_of_one_expert_or_no_token_is_zero():
    assert losses.load_importance_loss(torch.ones(3, 1), torch.ones(3, 1), 1, 1.0).item() == 0
    assert losses.load_importance_loss(torch.ones(0, 4), torch.ones(0, 2), 4, 1.0).item() == 0
