"""Bad calls of the low-level surface: each error names the argument, the value seen and what is allowed."""

import pytest
import torch
from tutel.impls import losses

from tutel import moe

X, IDS, SLOTS, GATES = torch.ones(3, 4), torch.tensor([0, 1, 0]), torch.tensor([0, 0, 1]), torch.ones(3)
SCORES = torch.softmax(torch.ones(3, 2), 1)


def made(num_global_experts=2, capacity=2, model_dim=4, dispatch_dtype=torch.float32):
    return moe.fast_dispatcher(num_global_experts, capacity, model_dim, dispatch_dtype)


def updated(ids=(IDS,), slots=(SLOTS,), gates=(GATES,), **options):
    def listed(parts):
        return list(parts) if isinstance(parts, tuple) else parts

    dispatcher = made()
    dispatcher.update(listed(ids), listed(slots), listed(gates), **options)
    return dispatcher


def plan(**changes):
    names = ("num_experts", "ids", "slots", "weights", "capacity", "counts")
    critical, _ = moe.top_k_routing(SCORES, 1)
    return tuple({**dict(zip(names, critical, strict=True)), **changes}.values())


BAD_CALLS = {
    "no experts": (lambda: made(num_global_experts=0), ValueError, "num_global_experts must be at least 1, got 0"),
    "fraction of an expert": (lambda: made(num_global_experts=1.5), TypeError, "num_global_experts .* 1.5"),
    "negative capacity": (lambda: made(capacity=-1), ValueError, "capacity must be at least 0, got -1"),
    "capacity of no kind": (lambda: made(capacity=None), TypeError, "capacity must be an integer, got None"),
    "negative width": (lambda: made(model_dim=-4), ValueError, "model_dim must be at least 0, got -4"),
    "integer dtype": (lambda: made(dispatch_dtype=torch.int32), TypeError, "dispatch_dtype .*, got torch.int32"),
    "no dtype": (lambda: made(dispatch_dtype=None), TypeError, "dispatch_dtype must be .*, got None"),
    "encode before update": (lambda: made().encode(X), RuntimeError, r"call update\(...\)"),
    "decode before update": (lambda: made().decode(X), RuntimeError, r"call update\(...\)"),
    "empty lists": (lambda: updated((), (), ()), ValueError, r"indices_ must have at least one tensor \(K >= 1\)"),
    "no list": (lambda: updated(IDS), TypeError, "indices_ must be a list of K tensors, got Tensor"),
    "slots too few": (lambda: updated((IDS, IDS)), ValueError, r"locations_ .* as indices_ \(2\), got 1"),
    "gates too many": (lambda: updated(gates=(GATES, GATES)), ValueError, r"gates_ .* as indices_ \(1\), got 2"),
    "slots of another length": (
        lambda: updated(slots=(SLOTS[:2],)), ValueError, r"locations_\[0\] .* as indices_\[0\] \(3\), got 2"
    ),
    "ids of another length": (
        lambda: updated((IDS, IDS[:1]), (SLOTS, SLOTS), (GATES, GATES)), ValueError, r"indices_\[1\] .* \(3\), got 1"
    ),
    "gates of another length": (lambda: updated(gates=(GATES[:1],)), ValueError, r"gates_\[0\] .* \(3\), got 1"),
    "float ids": (lambda: updated((IDS.float(),)), TypeError, r"indices_\[0\] .*, got torch.float32"),
    "float slots": (lambda: updated(slots=(SLOTS.float(),)), TypeError, r"locations_\[0\] .*, got torch.float32"),
    "integer gates": (lambda: updated(gates=(IDS,)), TypeError, r"gates_\[0\] .*, got torch.int64"),
    "ids no tensors": (lambda: updated(([0, 1, 0],)), TypeError, r"indices_\[0\] must be a torch.Tensor, got list"),
    "id too large": (lambda: updated((IDS + 1,)), RuntimeError, "topk_ids.*2"),
    "id too small": (lambda: updated((IDS - 2,)), RuntimeError, "topk_ids.*-2"),
    "negative new capacity": (lambda: updated(capacity=-2), ValueError, "capacity must be at least 0, got -2"),
    "fraction of a slot": (lambda: updated(capacity=2.5), TypeError, "capacity must be an integer, got 2.5"),
    "no switch": (lambda: updated(is_postscore="yes"), TypeError, "is_postscore must be True or False, got 'yes'"),
    "gates elsewhere": (lambda: updated(gates=(GATES.to("meta"),)), ValueError, "gates_.*one device, got meta and cpu"),
    "tokens too few": (lambda: updated().encode(X[:2]), ValueError, r"x must have shape \[T .* = 3, D\], got \[2, 4\]"),
    "tokens too narrow": (lambda: updated().encode(X[:, :3]), ValueError, r"x .* model_dim=4, got shape \[3, 3\]"),
    "tokens 1-D": (lambda: updated().encode(X[0, :3]), ValueError, r"x must have shape .*, got \[3\]"),
    "integer tokens": (lambda: updated().encode(X.long()), TypeError, "x must be .*, got torch.int64"),
    "tokens no tensor": (lambda: updated().encode(None), TypeError, "x must be a torch.Tensor, got NoneType"),
    "tokens elsewhere": (lambda: updated().encode(X.to("meta")), ValueError, "x .*one device, got meta and cpu"),
    "rows too few": (lambda: updated().decode(X), ValueError, r"y must have shape \[E \* C = 4, D\], got \[3, 4\]"),
    "integer rows": (lambda: updated().decode(torch.ones(4, 4).long()), TypeError, "y must be .*, got torch.int64"),
    "scores 1-D": (lambda: moe.top_k_routing(SCORES[0], 1), ValueError, r"scores .* \[any, any\], got \[2\]"),
    "integer scores": (lambda: moe.top_k_routing(SCORES.long(), 1), TypeError, "scores must be .*, got torch.int64"),
    "scores of no expert": (lambda: moe.top_k_routing(SCORES[:, :0], 1), ValueError, r"scores .* E >= 1 .*\[3, 0\]"),
    "no choice": (lambda: moe.top_k_routing(SCORES, 0), ValueError, "top_k must be at least 1, got 0"),
    "half a choice": (lambda: moe.top_k_routing(SCORES, 1.5), TypeError, "top_k must be an integer, got 1.5"),
    "no loss": (lambda: moe.top_k_routing(SCORES, 1, "gshard"), TypeError, "loss_fn must be callable, got 'gshard'"),
    "infinite capacity": (
        lambda: moe.top_k_routing(SCORES, 1, capacity_factor=float("inf")), ValueError, "capacity_factor must be finite"
    ),
    "capacity in words": (
        lambda: moe.top_k_routing(SCORES, 1, capacity_factor="1"), TypeError, "capacity_factor .* number, got '1'"
    ),
    "alignment": (lambda: moe.top_k_routing(SCORES, 1, alignment=0), ValueError, "alignment must be at least 1, got 0"),
    "normalize": (lambda: moe.top_k_routing(SCORES, 1, normalize_gate=2), TypeError, "normalize_gate must be True or"),
    "prioritized": (
        lambda: moe.top_k_routing(SCORES, 1, batch_prioritized_routing=None), TypeError, "batch_prioritized_.* None"
    ),
    "no plan": (lambda: moe.fast_encode(X, None), TypeError, "critial_data must be a tuple or list, got NoneType"),
    "half a plan": (lambda: moe.fast_decode(X, (2, [IDS])), ValueError, "critial_data must be .*, got 2 parts"),
    "plan without counts": (
        lambda: moe.get_dispatch_count(plan()[:5]), ValueError, "critial_data must be .* first 6 parts, got 5 parts"
    ),
    "data of no kind": (lambda: moe.fast_encode([1.0], plan()), TypeError, "data must be a torch.Tensor, got list"),
    "plan of bad slots": (
        lambda: moe.get_reversed_sample_ids(plan(slots=[SLOTS[:1]])), ValueError, r"critial_data\[2\] \(slots\)\[0\]"
    ),
    "plan of bad ids": (lambda: moe.get_reversed_sample_ids(plan(ids=[IDS + 9])), RuntimeError, "topk_ids.*9"),
    "which id": (
        lambda: moe.get_reversed_sample_ids(plan(), "token"), ValueError, "must be 'sample_id' or 'top_id', got 'token'"
    ),
    "mask 1-D": (lambda: moe.fast_cumsum_sub_one(IDS), ValueError, r"mask must have 2 dimensions, got shape \[3\]"),
    "mask's dim": (lambda: moe.fast_cumsum_sub_one(X, 2), ValueError, "dim must be 0 or 1, got 2"),
    "ids of other tokens": (lambda: losses.gshard_loss(SCORES, IDS[:2, None]), ValueError, r"top_ids .* \[3, any\]"),
    "float top ids": (lambda: losses.gshard_loss(SCORES, SCORES), TypeError, "top_ids must be .*, got torch.float32"),
    "experts": (lambda: losses.load_importance_loss(SCORES, SCORES, 3, 1.0), ValueError, r"scores_wo.* \[any, 3\]"),
    "no noise": (lambda: losses.load_importance_loss(SCORES, SCORES, 2, 0.0), ValueError, "gate_noise > 0, got 0.0"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_call(name):
    call, exception, text = BAD_CALLS[name]
    with pytest.raises(exception, match=text):
        call()


def test_a_refused_update_changes_nothing():
    dispatcher = updated()
    before = dispatcher.encode(X)
    with pytest.raises(RuntimeError):
        dispatcher.update([IDS + 5], [SLOTS], [GATES], capacity=9, is_postscore=False)
    assert torch.equal(dispatcher.encode(X), before)
