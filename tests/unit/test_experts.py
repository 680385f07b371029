"""Every option of every kind of experts changes what a hand computation says.

The gate chooses one expert a token with weight 1 (ONES_GATE), so a layer's output is the expert's.
"""

import warnings

import pytest
import torch
from matrix import user
from reference import random_values
from torch.nn import functional as F

from tutel import moe

D, H, E, T = 6, 5, 4, 12
FFN = {"count_per_node": E, "hidden_size_per_expert": H}


@pytest.fixture(autouse=True)
def _ones_gate(monkeypatch):
    monkeypatch.setenv("ONES_GATE", "1")


def make(experts, **options):
    options.setdefault("seeds", (1, 2, 3))
    return moe.moe_layer({"k": 1, "capacity_factor": 0.0}, D, experts, **options).double()


def tokens_of(dtype=torch.float64):
    return random_values((T, D), dtype, seed=4)


def owners(layer, tokens):
    return layer.gates[0].wg(tokens).argmax(1).tolist()


def check(layer, function, tokens=None):
    """``function(e, token)`` is what expert e makes of a token."""
    tokens = tokens_of() if tokens is None else tokens
    expected = torch.stack([function(e, token) for e, token in zip(owners(layer, tokens), tokens, strict=True)])
    output = layer(tokens)
    assert output.shape == expected.shape
    torch.testing.assert_close(output, expected)


def ffn(layer, activation=torch.relu):
    """y = act(x W1 + b1) W2 + b2 of one token, with the layer's parameters."""
    w1, b1, w2, b2 = (getattr(layer.experts, f"batched_{name}") for name in ("fc1_w", "fc1_bias", "fc2_w", "fc2_bias"))

    def function(e, token):
        hidden = w1[e] @ token
        output = activation(hidden if b1 is None else hidden + b1[e]) @ w2[e]
        return output if b2 is None else output + b2[e]

    return function


@pytest.mark.parametrize("given", [{}, {"activation_fn": None}, {"type": "ffn"}], ids=["left out", "None", "ffn"])
def test_ffn_with_relu(given):
    layer = make({**FFN, **given})
    check(layer, ffn(layer))
    assert {name: list(p.shape) for name, p in layer.experts.named_parameters()} == {
        "batched_fc1_w": [E, H, D], "batched_fc2_w": [E, H, D],
        "batched_fc1_bias": [E, H], "batched_fc2_bias": [E, D],
    }  # fmt: skip


@pytest.mark.parametrize("activation", [torch.tanh, torch.nn.GELU(), lambda x: F.silu(x) * 2], ids=["f", "nn", "λ"])
def test_activation_fn(activation):
    layer = make({**FFN, "activation_fn": activation})
    check(layer, ffn(layer, activation))


def test_activation_fn_with_self():
    layer = make({**FFN, "activation_fn_with_self": user.scaled_by_bias})
    check(layer, ffn(layer, lambda hidden: user.scaled_by_bias(hidden, layer.experts)))


@pytest.mark.parametrize("fc1", [True, False])
@pytest.mark.parametrize("fc2", [True, False])
def test_biases(fc1, fc2):
    layer = make({**FFN, "has_fc1_bias": fc1, "has_fc2_bias": fc2})
    names = {name for name, _ in layer.experts.named_parameters()}
    assert ("batched_fc1_bias" in names, "batched_fc2_bias" in names) == (fc1, fc2)
    check(layer, ffn(layer))


@pytest.mark.parametrize("width", [1, 3, 9])
def test_output_dim(width):
    layer = make({**FFN, "output_dim": width})
    assert list(layer.experts.batched_fc2_w.shape) == [E, H, width]
    check(layer, ffn(layer))
    assert layer(tokens_of().view(3, 4, D)).shape == (3, 4, width)


def test_fc1_copies():
    layer = make({**FFN, "fc1_copies": 2, "activation_fn": user.gated})
    assert list(layer.experts.batched_fc1_w.shape) == [E, 2 * H, D]
    assert list(layer.experts.batched_fc1_bias.shape) == [E, 2 * H]
    assert list(layer.experts.batched_fc2_w.shape) == [E, H, D]
    check(layer, ffn(layer, user.gated))


def test_implicit_dropout_p_is_behind_the_activation_and_behind_the_second_layer():
    """Values are kept and scaled by 1 / (1 - p), or zero; in eval mode nothing happens."""
    layer = make({**FFN, "implicit_dropout_p": 0.5})
    with torch.no_grad():
        layer.experts.batched_fc1_w.zero_()
        layer.experts.batched_fc1_bias.fill_(1.0)
        layer.experts.batched_fc2_w.fill_(1.0)
        layer.experts.batched_fc2_bias.fill_(0.25)
    tokens = random_values((400, D))
    possible = [0.0] + [2 * (2 * n + 0.25) for n in range(H + 1)]
    output = layer.train()(tokens)
    assert set(output.flatten().tolist()) == set(possible)
    assert (output == 0).double().mean().item() == pytest.approx(0.5, abs=0.05)
    # The hidden units that a row lost are lost in all its values.
    assert all(len(set(row[row != 0].tolist())) <= 1 for row in output)
    assert output.mean().item() == pytest.approx(H + 0.25, rel=0.1)
    assert torch.equal(layer.eval()(tokens), torch.full_like(tokens, H + 0.25))


def test_fused_custom_fn():
    seen = []

    def function(experts, x):
        seen.append((experts, x.shape))
        return user.fused(experts, x)

    layer = make({**FFN, "fused_custom_fn": function})
    check(layer, ffn(layer, torch.tanh))
    assert seen[0][0] is layer.experts
    assert seen[0][1] == (E, layer.dispatch_count.max(), D)


def test_attention():
    options = {"attention_fn": user.linear_attention, "has_fc1_bias": False}
    layer = make({"type": "attention", "count_per_node": E, **options})
    experts, tokens = layer.experts, tokens_of()
    assert list(experts.batched_fc1_w.shape) == [E, 3 * D, D]
    assert list(experts.batched_fc2_w.shape) == [E, D, D]
    owner, expected = torch.tensor(owners(layer, tokens)), torch.zeros_like(tokens)
    for e in range(E):
        query, key, value = (tokens[owner == e] @ experts.batched_fc1_w[e].T).chunk(3, 1)
        hidden = query @ (key.T @ value) / 4
        expected[owner == e] = hidden @ experts.batched_fc2_w[e] + experts.batched_fc2_bias[e]
    torch.testing.assert_close(layer(tokens), expected)


@pytest.mark.parametrize("activation", [None, torch.tanh], ids=["silu", "tanh"])
def test_llama_ffn(activation):
    experts = {**FFN, "type": "llama_ffn", **({"activation_fn": activation} if activation else {})}
    layer = make(experts)
    w1, w2, w3 = layer.experts.W_fc1, layer.experts.W_fc2, layer.experts.W_fc3
    assert [list(w.shape) for w in (w1, w2, w3)] == [[E, D, H], [E, D, H], [E, H, D]]
    check(layer, lambda e, x: ((activation or F.silu)(x @ w1[e]) * (x @ w2[e])) @ w3[e])


@pytest.mark.parametrize("count", ["count_per_node", "num_experts_per_device"])
def test_custom_class(count):
    layer = make({"type": "custom", "module": user.Experts, count: E, "hidden_size": 7, "output_dim": 3})
    assert layer.experts.made_with == (D, E, 1)
    first, second = layer.experts.first, layer.experts.second
    assert list(first.shape) == [E, D, 7]
    check(layer, lambda e, x: torch.tanh(x @ first[e]) @ second[e])


def test_custom_class_sees_rows_and_the_context():
    layer, tokens = make({"type": "custom", "module": user.Experts, "count_per_node": E}), tokens_of()
    layer(tokens, megablocks_size=8, adaptive_r=0)
    x, ctx = layer.experts.seen
    counts = torch.bincount(torch.tensor(owners(layer, tokens)), minlength=E)
    assert x.shape == (E, counts.max(), D)
    for e in range(E):
        assert torch.equal(x[e, : counts[e]], tokens[torch.tensor(owners(layer, tokens)) == e])
        assert not x[e, counts[e] :].any()
    assert ctx.dispatch_count.tolist() == counts.tolist() == layer.dispatch_count.tolist()
    assert (ctx.num_global_experts, ctx.num_local_experts, ctx.model_dim, ctx.world_size) == (E, E, D, 1)
    assert (ctx.sharded_count, ctx.group, ctx.adaptive_degree, ctx.megablocks_size) == (1, None, 0, 8)


def test_custom_class_gets_no_more_rows_than_the_capacity():
    layer = make({"type": "custom", "module": user.Experts, "count_per_node": E})
    layer(tokens_of(), capacity_factor=0.4)
    assert layer.experts.seen[0].shape == (E, 1, D)  # int(0.4 * 12 / 4)


def test_custom_class_of_the_older_interface():
    with pytest.warns(DeprecationWarning, match="OlderExperts takes `local_experts`.*`num_experts_per_device`"):
        layer = make({"type": "custom", "module": user.OlderExperts, "count_per_node": E})
    check(layer, lambda e, x: x * (e + 1))


@pytest.mark.parametrize("kind", [list, tuple, torch.nn.ModuleList])
def test_one_module_an_expert(kind):
    modules = [user.Expert(D, H, 3) for _ in range(E)]
    layer = make(kind(modules))
    assert layer.num_local_experts == layer.num_global_experts == E
    assert all(own is given for own, given in zip(layer.experts, modules, strict=True))
    check(layer, lambda e, x: modules[e](x.unsqueeze(0)).squeeze(0))


def test_a_module_is_one_expert():
    module = user.Expert(D, H)
    layer = make(module)
    assert (layer.num_global_experts, list(layer.experts)) == (1, [module])
    torch.testing.assert_close(layer(tokens_of()), module(tokens_of()))


class NoParameters(torch.nn.Module):
    def forward(self, x):
        return x * 3


def test_modules_without_parameters_and_experts_without_rows():
    layer = make([NoParameters() for _ in range(3)])
    with torch.no_grad():
        layer.gates[0].wg.weight[1:] = 0
        layer.gates[0].wg.weight[0] = 1
    tokens = tokens_of().abs()
    assert torch.equal(layer(tokens), tokens * 3)
    assert layer.dispatch_count.tolist() == [T, 0, 0]


@pytest.mark.parametrize("spelling", [2, "2", 2.0])
def test_spellings_of_a_count(spelling):
    for key in ("count_per_node", "num_experts_per_device"):
        layer = make({key: spelling, "hidden_size_per_expert": H})
        assert (layer.num_local_experts, layer.num_global_experts, layer.sharded_count) == (2, 2, 1)


@pytest.mark.parametrize("spelling", [-1, "-1", 1, 1.0])
def test_one_device_with_one_expert(spelling):
    layer = make({"count_per_node": spelling, "hidden_size_per_expert": H})
    assert (layer.num_local_experts, layer.num_global_experts, layer.sharded_count) == (1, 1, 1)


@pytest.mark.parametrize(("spelling", "ranks"), [(0.5, 2), (-2, 2), ("-4", 4), (0.25, 4), (1 / 3, 3)])
def test_experts_that_devices_share_need_these_devices(spelling, ranks):
    message = rf"count_per_node.*{ranks} ranks share one expert.*number of ranks \(1\)"
    with pytest.raises(ValueError, match=message):
        make({"count_per_node": spelling, "hidden_size_per_expert": H})


def test_draws_of_ffn_experts():
    """Expert by expert, on the CPU, in the default dtype."""
    layer = moe.moe_layer({"k": 1}, D, dict(FFN), seeds=(1, 52, 3))
    torch.manual_seed(52)
    for e in range(E):
        fc1, fc2 = torch.nn.Linear(D, H), torch.nn.Linear(H, D)
        assert torch.equal(layer.experts.batched_fc1_w[e], fc1.weight)
        assert torch.equal(layer.experts.batched_fc1_bias[e], fc1.bias)
        assert torch.equal(layer.experts.batched_fc2_w[e], fc2.weight.T)
        assert torch.equal(layer.experts.batched_fc2_bias[e], fc2.bias)


@pytest.mark.parametrize("experts", [FFN, {**FFN, "type": "llama_ffn"}, [user.Expert(D), user.Expert(D)]])
def test_parameters_are_marked_and_scanned(experts):
    seen = {}
    layer = make(experts, scan_expert_func=lambda name, p: seen.update({name: p}))
    own = dict(layer.experts.named_parameters())
    assert seen.keys() == dict(layer.get_parameter_iterator("local_experts")).keys() == own.keys()
    assert all(parameter._tutel_expert for parameter in layer.experts.parameters())
    assert not any(hasattr(parameter, "_tutel_expert") for parameter in layer.gates.parameters())


def test_no_warning_from_ordinary_use():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(FFN)(tokens_of())
