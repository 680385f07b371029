"""Every option of every gate changes what a hand computation says."""

import math

import pytest
import torch
from matrix import user
from reference import random_values
from torch.nn import functional as F

from tutel import moe

FFN = {"count_per_node": 4, "hidden_size_per_expert": 5}
D, E, T = 6, 4, 12


def tokens_of(dtype=torch.float64, seed=0):
    return random_values((T, D), dtype, seed=seed)


def make(gate, **options):
    options.setdefault("seeds", (1, 2, 3))
    return moe.moe_layer(gate, D, dict(FFN), **options)


def expert_outputs(layer, tokens):
    """[E, T, D]: each token through each expert, by plain torch."""
    experts = layer.experts
    hidden = torch.relu(tokens @ experts.batched_fc1_w.transpose(1, 2) + experts.batched_fc1_bias.unsqueeze(1))
    return hidden @ experts.batched_fc2_w + experts.batched_fc2_bias.unsqueeze(1)


def by_hand(layer, tokens, logits, *, top_k=2, normalize=True, keep=None):
    """The layer's output for given logits; keep(t, j) says which choices are not dropped."""
    scores = torch.softmax(logits, 1)
    weights, ids = scores.topk(top_k)
    if normalize and top_k > 1:
        weights = weights / weights.sum(1, keepdim=True)
    outputs, result = expert_outputs(layer, tokens), torch.zeros_like(tokens)
    for t in range(len(tokens)):
        for j in range(top_k):
            if keep is None or keep(t, j):
                result[t] += weights[t, j] * outputs[ids[t, j], t]
    return result


def check(layer, tokens, logits, **options):
    torch.testing.assert_close(layer(tokens), by_hand(layer, tokens, logits, **options))


def kept(ids, capacity, order=None):
    """Which choices have a slot below the capacity: first choices first, tokens in their order or in the given one."""
    counts, result = [0] * E, set()
    for j in range(ids.shape[1]):
        for t in order if order is not None else range(len(ids)):
            if counts[ids[t, j]] < capacity:
                result.add((t, j))
            counts[ids[t, j]] += 1
    return lambda t, j: (t, j) in result


@pytest.mark.parametrize("top_k", [1, 2, 3, 4, "2", 2.0])
@pytest.mark.parametrize("normalize", [True, False])
def test_k_and_normalize_gate(top_k, normalize):
    layer = make({"k": top_k, "capacity_factor": 0.0}, normalize_gate=normalize).double()
    tokens = tokens_of()
    check(layer, tokens, layer.gates[0].wg(tokens), top_k=int(top_k), normalize=normalize)


def test_k_defaults_to_1_and_is_limited_to_the_number_of_experts():
    assert make({"type": "top"}).gates[0].top_k == 1
    assert make({"k": 9}).gates[0].top_k == 4


@pytest.mark.parametrize("factor", [0.5, 1.0, -0.5, 0.0])
def test_capacity_factor(factor):
    layer = make({"k": 2, "capacity_factor": factor}).double()
    tokens = tokens_of()
    logits = layer.gates[0].wg(tokens)
    capacity = 2 * int(abs(factor) * math.ceil(T / E)) if factor else T
    check(layer, tokens, logits, keep=kept(logits.topk(2).indices, capacity))


def test_cap_factor_is_the_default(monkeypatch):
    assert make({"k": 2}).gates[0].capacity_factor == 1.0
    monkeypatch.setenv("CAP_FACTOR", "0.25")
    assert make({"k": 2}).gates[0].capacity_factor == 0.25
    assert make({"k": 2, "capacity_factor": 2.0}).gates[0].capacity_factor == 2.0


@pytest.mark.parametrize("where", ["gate", "layer", "environment", "gate against layer"])
def test_batch_prioritized_routing(where, monkeypatch):
    gate, options = {"k": 2, "capacity_factor": 0.5}, {}
    if where == "gate":
        gate["batch_prioritized_routing"] = True
    elif where == "layer":
        options["batch_prioritized_routing"] = True
    elif where == "environment":
        monkeypatch.setenv("BATCH_PRIO", "1")
    else:
        gate["batch_prioritized_routing"], options["batch_prioritized_routing"] = False, True
    layer, tokens = make(gate, **options).double(), tokens_of()
    logits = layer.gates[0].wg(tokens)
    order = torch.softmax(logits, 1).amax(1).argsort(descending=True, stable=True).tolist()
    ids = logits.topk(2).indices
    in_order, by_score = kept(ids, 2), kept(ids, 2, order)
    assert any(in_order(t, j) != by_score(t, j) for t in range(T) for j in range(2))
    check(layer, tokens, logits, keep=in_order if where == "gate against layer" else by_score)


def test_gate_noise_is_drawn_from_the_generator():
    layer, tokens = make({"k": 2, "capacity_factor": 0.0, "gate_noise": 3.0}).double(), tokens_of()
    clean = layer.gates[0].wg(tokens)
    torch.manual_seed(11)
    noisy = clean + 3.0 * torch.randn(T, E, dtype=torch.float64) / E
    assert not torch.equal(clean.topk(2).indices, noisy.topk(2).indices)
    torch.manual_seed(11)
    check(layer.train(), tokens, noisy)
    check(layer.eval(), tokens, clean)


@pytest.mark.parametrize("kind", ["cosine_top", "custom"])
def test_gate_noise_of_other_gates(kind):
    gate = {"type": kind, "gate_noise": 2.0, "capacity_factor": 0.0}
    gate |= {"k": 2} if kind == "cosine_top" else {"module": user.Gate, "top_k": 2}
    layer, tokens = make(gate).double(), tokens_of()
    clean = layer.gates[0](tokens)
    torch.manual_seed(12)
    noisy = clean + 2.0 * torch.randn(T, E, dtype=torch.float64) / E
    torch.manual_seed(12)
    check(layer, tokens, noisy)


def test_input_dropout_p():
    layer, tokens = make({"k": 2, "capacity_factor": 0.0, "input_dropout_p": 0.4}).double(), tokens_of()
    torch.manual_seed(13)
    dropped = F.dropout(tokens, 0.4)
    torch.manual_seed(13)
    torch.testing.assert_close(layer.train()(tokens), by_hand(layer, dropped, layer.gates[0].wg(dropped)))
    check(layer.eval(), tokens, layer.gates[0].wg(tokens))


@pytest.mark.parametrize("kind", ["top", "cosine_top"])
def test_fp32_gate(kind):
    layer = make({"type": kind, "k": 2, "fp32_gate": True}).to(torch.bfloat16)
    tokens = tokens_of(torch.bfloat16)
    assert layer.gates[0](tokens).dtype == torch.float32
    assert make({"type": kind, "k": 2}).to(torch.bfloat16).gates[0](tokens).dtype == torch.bfloat16
    torch.set_default_dtype(torch.float64)
    assert {p.dtype for p in make({"type": kind, "fp32_gate": True}).gates.parameters()} == {torch.float32}
    assert {p.dtype for p in make({"type": kind}).gates.parameters()} == {torch.float64}


def test_cosine_gate():
    layer, tokens = make({"type": "cosine_top", "k": 2, "proj_dim": 7, "capacity_factor": 0.0}).double(), tokens_of()
    gate = layer.gates[0]
    projected = tokens @ gate.cosine_projector.weight.T + gate.cosine_projector.bias
    cosines = F.cosine_similarity(projected.unsqueeze(1), gate.sim_matrix.T.unsqueeze(0), dim=2)
    check(layer, tokens, cosines * 2.0)  # init_t = 0.5
    with torch.no_grad():
        gate.temperature.fill_(50.0)
    check(layer, tokens, cosines * 100.0)


@pytest.mark.parametrize("init_t", [0.5, 0.07, 2.0])
def test_init_t_and_proj_dim(init_t):
    gate = make({"type": "cosine_top", "init_t": init_t, "proj_dim": 3}).gates[0]
    assert gate.temperature.shape == (1,)
    assert gate.temperature.item() == pytest.approx(math.log(1 / init_t))
    assert gate.cosine_projector.weight.shape == (3, D)
    assert gate.sim_matrix.shape == (3, E)
    assert make({"type": "cosine_top"}).gates[0].sim_matrix.shape == (256, E)


def test_draws_of_the_linear_gate():
    layer = make([{"k": 1}, {"k": 2}], seeds=(40, 2, 3))
    for index in range(2):
        torch.manual_seed(40 + index)
        assert torch.equal(layer.gates[index].wg.weight, torch.nn.Linear(D, E, bias=False).weight)


def test_draws_of_the_cosine_gate():
    gate = make({"type": "cosine_top", "proj_dim": 7}, seeds=(41, 2, 3)).gates[0]
    torch.manual_seed(41)
    projector = torch.nn.Linear(D, 7)
    torch.randn(7, E)
    sim_matrix = torch.nn.init.normal_(torch.empty(7, E), 0, 0.01)
    assert torch.equal(gate.cosine_projector.weight, projector.weight)
    assert torch.equal(gate.cosine_projector.bias, projector.bias)
    assert torch.equal(gate.sim_matrix, sim_matrix)


def test_gate_index():
    gates = [{"k": 1}, {"k": 2}, {"type": "cosine_top", "k": 2, "proj_dim": 7}]
    layer, tokens = make([{**gate, "capacity_factor": 0.0} for gate in gates]).double(), tokens_of()
    for index, gate in enumerate(layer.gates):
        expected = by_hand(layer, tokens, gate(tokens), top_k=gate.top_k)
        torch.testing.assert_close(layer(tokens, gate_index=index), expected)
        torch.testing.assert_close(layer(tokens, index), expected)
    torch.testing.assert_close(layer(tokens), layer(tokens, gate_index=0))


def test_the_historic_string():
    with pytest.warns(DeprecationWarning, match=r"gate_type='Top2Gate' is deprecated.*'k': 2"):
        layer = make("Top2Gate")
    same = make({"type": "top", "k": 2})
    tokens = tokens_of(torch.float32)
    assert torch.equal(layer(tokens), same(tokens))


@pytest.mark.parametrize("kind", ["top", "cosine_top", "custom"])
def test_attributes_may_change_between_forwards(kind):
    gate = {"type": kind, "capacity_factor": 0.0}
    gate |= {"module": user.Gate, "top_k": 2} if kind == "custom" else {"k": 2}
    layer, tokens = make(gate).double(), tokens_of()
    logits = layer.gates[0](tokens)
    check(layer, tokens, logits)
    layer.gates[0].top_k = 3
    check(layer, tokens, logits, top_k=3)
    layer.gates[0].capacity_factor = 0.5
    check(layer, tokens, logits, top_k=3, keep=kept(logits.topk(3).indices, 3))
    layer.gates[0].gate_noise = 1.0
    torch.manual_seed(3)
    layer.gates[0].capacity_factor = 0.0
    noisy = logits + torch.randn(T, E, dtype=torch.float64) / E
    torch.manual_seed(3)
    check(layer, tokens, noisy, top_k=3)


class OwnOptions(user.Gate):
    def __init__(self, **options):
        super().__init__(**options)
        self.capacity_factor = 0.5
        self.gate_noise = 0.0


def test_a_custom_gate_is_made_with_every_other_key_and_wins():
    options = {"capacity_factor": 0.0, "gate_noise": 5.0, "top_k": 2, "mine": "x"}
    layer = make({"type": "custom", "module": OwnOptions, **options}).double()
    assert layer.gates[0].seen == {"capacity_factor": 0.0, "gate_noise": 5.0, "mine": "x"}
    tokens = tokens_of()
    logits = layer.gates[0](tokens)
    check(layer, tokens, logits, keep=kept(logits.topk(2).indices, 2))
    # A gate that sets none has the dict's.
    layer = make({"type": "custom", "module": user.Gate, **options, "gate_noise": 0.0}).double()
    check(layer, tokens, layer.gates[0](tokens))


def test_a_custom_gate_may_choose_more_than_there_are():
    layer, tokens = make({"type": "custom", "module": user.Gate, "top_k": 9, "capacity_factor": 0.0}), tokens_of()
    layer = layer.double()
    check(layer, tokens, layer.gates[0](tokens), top_k=4)


def test_negative_k_is_one_choice_of_an_expert_that_devices_share():
    tokens = tokens_of(torch.float32)
    left = moe.moe_layer({"k": -1}, D, {"hidden_size_per_expert": 5}, seeds=(1, 2, 3))
    right = moe.moe_layer({"k": 1}, D, {"hidden_size_per_expert": 5, "count_per_node": -1}, seeds=(1, 2, 3))
    assert left.gates[0].top_k == right.gates[0].top_k == 1
    assert torch.equal(left(tokens), right(tokens))


def test_megatron_is_one_dense_layer():
    layer = moe.moe_layer({"type": "megatron"}, D, {"hidden_size_per_expert": 5}, seeds=(1, 2, 3)).double()
    tokens = tokens_of()
    torch.testing.assert_close(layer(tokens), expert_outputs(layer, tokens)[0])
    assert layer.dispatch_count.tolist() == [T]
    assert list(layer.get_parameter_iterator("gate")) == []
