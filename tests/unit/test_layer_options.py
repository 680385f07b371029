"""What the layer's options do: shapes, several gates, precision of the gate, noise, order of service, the loss."""

import pytest
import reference
import torch
from reference import exact_gates, exact_tokens, leaves, make_layer, random_values

from tutel import moe

TOKENS = random_values((12, 6), torch.float32)


@pytest.mark.parametrize("leading", [(1,), (3,), (2, 3), (2, 1, 3), (0,), (2, 0), (0, 0, 4)])
def test_any_leading_dimensions(leading):
    layer = make_layer(capacity_factor=0.0)
    tokens = random_values((*leading, 6), torch.float32).requires_grad_()
    output = layer(tokens)
    assert output.shape == tokens.shape
    assert torch.equal(output.reshape(-1, 6), layer(tokens.reshape(-1, 6)))
    (output.sum() + output.l_aux).backward()
    assert tokens.grad.shape == tokens.shape
    if tokens.numel() == 0:
        assert layer.l_aux.item() == 0
        assert all(parameter.grad.eq(0).all() for parameter in layer.parameters())


@pytest.mark.parametrize("options", [{}, {"top_k": 4}, {"capacity_factor": 0.5}, {"is_postscore": False}])
def test_number_of_tokens_changes_freely(options):
    layer = make_layer(**options)
    for num_tokens in (4, 100, 1, 0, 7, 100):
        tokens = random_values((num_tokens, 6), torch.float32, seed=num_tokens)
        output, l_aux = reference.forward(layer, tokens)
        torch.testing.assert_close(layer(tokens), output)
        torch.testing.assert_close(layer.l_aux, l_aux)


def test_several_trailing_dimensions():
    layer = make_layer()
    tokens = random_values((5, 2, 3), torch.float32)
    output = layer(tokens, reserve_dims=2)
    assert output.shape == tokens.shape
    assert torch.equal(output.reshape(5, 6), layer(tokens.reshape(5, 6)))
    layer = make_layer(experts={"output_dim": 7})
    assert layer(tokens, reserve_dims=2).shape == (5, 7)
    assert layer(random_values((2, 5, 6), torch.float32)).shape == (2, 5, 7)


@pytest.mark.parametrize("dtype", reference.DTYPES, ids=str)
def test_output_has_the_dtype_of_the_input(dtype):
    for layer_dtype in reference.DTYPES:
        layer = make_layer(dtype=layer_dtype)
        (tokens,) = leaves(TOKENS.to(dtype))
        output = layer(tokens)
        assert output.dtype == dtype
        output.sum().backward()
        assert tokens.grad.dtype == dtype
        assert {parameter.grad.dtype for parameter in layer.parameters()} == {layer_dtype}


def test_several_gates():
    layer = moe.moe_layer(
        [{"k": 1, "capacity_factor": 0.0}, {"k": 3, "capacity_factor": 0.0}],
        6,
        {"count_per_node": 4, "hidden_size_per_expert": 5},
        seeds=(7, 1, 1),
    )
    assert [gate.top_k for gate in layer.gates] == [1, 3]
    assert not torch.equal(layer.gates[0].wg.weight, layer.gates[1].wg.weight)
    for index in (0, 1):
        expected, _ = reference.forward(layer, TOKENS, gate_index=index)
        torch.testing.assert_close(layer(TOKENS, gate_index=index), expected)
        assert int(layer.dispatch_count.sum()) == 12 * [1, 3][index]
    assert torch.equal(layer(TOKENS), layer(TOKENS, gate_index="0"))


def test_top_k_is_limited_to_the_number_of_experts():
    layer = make_layer(num_experts=3, top_k=8)
    assert layer.gates[0].top_k == 3
    layer(TOKENS)
    assert layer.dispatch_count.tolist() == [12, 12, 12]


@pytest.mark.parametrize("given", ["2", 2.0, torch.tensor(2)])
def test_top_k_is_whatever_converts_to_an_integer(given):
    assert make_layer(top_k=given).gates[0].top_k == 2


def test_negative_top_k_of_one_process():
    layer = moe.moe_layer({"k": -1}, 6, {"hidden_size_per_expert": 5})
    assert (layer.gates[0].top_k, layer.num_global_experts, layer.sharded_count) == (1, 1, 1)


@pytest.mark.parametrize("convert", [torch.nn.Module.half, torch.nn.Module.bfloat16, lambda module: module])
def test_fp32_gate(convert):
    layer = convert(make_layer(gate={"fp32_gate": True}))
    dtype = layer.experts.batched_fc1_w.dtype
    tokens = TOKENS.to(dtype)
    output = layer(tokens)
    assert output.dtype == dtype
    assert output.l_aux.dtype == torch.float32
    chosen = reference.select_experts(tokens.float() @ layer.gates[0].wg.weight.float().T, 2)
    assert layer.dispatch_count.tolist() == torch.bincount(chosen.ids.flatten(), minlength=4).tolist()
    assert make_layer(gate={"fp32_gate": False}).half()(TOKENS.half()).l_aux.dtype == torch.float16


def test_gate_of_its_own_dtype_when_made_under_another_default():
    torch.set_default_dtype(torch.bfloat16)
    layer = make_layer(gate={"fp32_gate": True})
    assert layer.gates[0].wg.weight.dtype == torch.float32
    assert layer.experts.batched_fc1_w.dtype == torch.bfloat16


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("normalize", [True, False])
def test_weights_are_normalised_for_several_choices_only(top_k, normalize):
    # Experts that return 1 whatever comes: the output is the sum of a token's weights.
    layer = make_layer(top_k=top_k, capacity_factor=0.0, normalize_gate=normalize)
    with torch.no_grad():
        layer.experts.batched_fc2_w.zero_()
        layer.experts.batched_fc2_bias.fill_(1)
    output = layer(TOKENS)
    scores = torch.softmax(layer.gates[0](TOKENS), dim=1).topk(top_k, dim=1).values.sum(dim=1)
    expected = torch.ones(12) if normalize and top_k > 1 else scores
    torch.testing.assert_close(output, expected[:, None].expand(12, 6))


def test_batch_prioritized_routing_serves_the_surest_token():
    # Two experts, room for one token each; all three tokens choose expert 0, the last one most surely.
    def outputs(**options):
        layer = make_layer(model_dim=2, num_experts=2, hidden_size=1, top_k=1, capacity_factor=0.5, **options)
        with torch.no_grad():
            layer.gates[0].wg.weight.copy_(torch.eye(2))
            layer.experts.batched_fc2_w.zero_()
            layer.experts.batched_fc2_bias.fill_(1)
        return layer(torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]]))

    sure = [torch.softmax(torch.tensor([t, 0.0]), 0)[0].item() for t in (1.0, 3.0)]
    assert outputs()[:, 0].tolist() == pytest.approx([sure[0], 0, 0])
    assert outputs(batch_prioritized_routing=True)[:, 0].tolist() == pytest.approx([0, 0, sure[1]])
    option = {"batch_prioritized_routing": True}
    assert outputs(gate=option)[:, 0].tolist() == pytest.approx([0, 0, sure[1]])
    assert outputs(gate={"batch_prioritized_routing": False}, **option)[:, 0].tolist() == pytest.approx([sure[0], 0, 0])


def test_gate_noise_is_for_training_only():
    layer = make_layer(gate={"gate_noise": 100.0}, capacity_factor=0.0)
    quiet = make_layer(capacity_factor=0.0)
    assert torch.equal(layer.eval()(TOKENS), quiet(TOKENS))
    layer.train()
    assert not torch.equal(layer(TOKENS), layer(TOKENS))
    torch.manual_seed(4)
    logits = layer.gates[0](TOKENS)
    noisy = logits + torch.randn(12, 4) * 100 / 4
    expected = torch.bincount(noisy.topk(2, dim=1).indices.flatten(), minlength=4)
    torch.manual_seed(4)
    layer(TOKENS)
    assert layer.dispatch_count.tolist() == expected.tolist()


def test_auxiliary_loss_is_the_formula():
    layer = exact_gates(make_layer(num_experts=5, top_k=2, dtype=torch.float64))
    tokens = exact_tokens(30, 6)
    scores = torch.softmax(tokens @ layer.gates[0].wg.weight.T, dim=1)
    first = torch.nn.functional.one_hot(reference.top_ids(scores, 1)[:, 0], 5).double()
    expected = 5 / 30**2 * (scores.sum(0) * first.sum(0)).sum()
    torch.testing.assert_close(layer(tokens).l_aux, expected)
    assert make_layer(num_experts=1, top_k=1)(TOKENS).l_aux.item() == pytest.approx(1.0)


def test_dropped_choices_add_nothing_and_get_no_gradient():
    layer = make_layer(num_experts=2, top_k=1, capacity_factor=0.5)
    with torch.no_grad():
        layer.gates[0].wg.weight.copy_(torch.tensor([[1.0] * 6, [-1.0] * 6]))
    (tokens,) = leaves(TOKENS.abs())
    output = layer(tokens)  # all to expert 0, which takes three
    assert output[3:].eq(0).all()
    assert output[:3].ne(0).any(dim=1).all()
    output.sum().backward()
    assert tokens.grad[3:].eq(0).all()
    assert layer.experts.batched_fc1_w.grad[1].eq(0).all()


def test_environment_gives_defaults_only(monkeypatch):
    monkeypatch.setenv("CAP_FACTOR", "0.25")
    monkeypatch.setenv("BATCH_PRIO", "1")
    plain = moe.moe_layer({}, 6, {"hidden_size_per_expert": 5})
    assert plain.gates[0].capacity_factor == 0.25
    set_by_hand = moe.moe_layer({"capacity_factor": 2.0}, 6, {"hidden_size_per_expert": 5})
    assert set_by_hand.gates[0].capacity_factor == 2.0
    monkeypatch.delenv("CAP_FACTOR")
    assert moe.moe_layer({}, 6, {"hidden_size_per_expert": 5}).gates[0].capacity_factor == 1.0
    tokens = TOKENS.abs()
    by_environment = make_layer(top_k=1, capacity_factor=0.5)
    monkeypatch.delenv("BATCH_PRIO")
    assert torch.equal(
        by_environment(tokens), make_layer(top_k=1, capacity_factor=0.5, batch_prioritized_routing=True)(tokens)
    )
    monkeypatch.setenv("BATCH_PRIO", "1")
    explicit = make_layer(top_k=1, capacity_factor=0.5, batch_prioritized_routing=False)
    monkeypatch.delenv("BATCH_PRIO")
    assert torch.equal(explicit(tokens), make_layer(top_k=1, capacity_factor=0.5)(tokens))
