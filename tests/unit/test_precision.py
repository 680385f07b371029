"""Autocast, half modules, fp64: every stage computes in the dtype that it promises."""

import pytest
import torch
from reference import exact_gates, exact_tokens, leaves, make_layer, random_values

TOKENS = random_values((12, 6), torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    seen = []

    def relu(hidden):
        seen.append(hidden.dtype)
        return torch.relu(hidden)

    layer = exact_gates(make_layer(capacity_factor=0.0, experts={"activation_fn": relu}))
    tokens = exact_tokens(12, 6, torch.float32).requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        output = layer(tokens)
    assert seen == [dtype], "experts run in autocast's dtype"
    assert output.dtype == torch.float32
    assert output.l_aux.dtype == torch.float32, "the gate does not"
    (output.sum() + output.l_aux).backward()
    assert tokens.grad.dtype == torch.float32
    assert {parameter.grad.dtype for parameter in layer.parameters()} == {torch.float32}
    expected = layer(tokens)
    assert not torch.equal(output, expected)
    torch.testing.assert_close(output, expected, atol=8 * torch.finfo(dtype).eps, rtol=8 * torch.finfo(dtype).eps)


def test_autocast_that_is_off_changes_nothing():
    layer = make_layer()
    with torch.autocast("cpu", enabled=False):
        output = layer(TOKENS)
    assert torch.equal(output, layer(TOKENS))


@pytest.mark.parametrize("convert", ["half", "bfloat16", "float", "double"])
def test_converted_modules_train(convert):
    layer = getattr(make_layer(capacity_factor=0.0), convert)()
    dtype = layer.experts.batched_fc1_w.dtype
    (tokens,) = leaves(TOKENS.to(dtype))
    output = layer(tokens)
    assert output.dtype == dtype
    (output.sum() + output.l_aux).backward()
    assert {parameter.grad.dtype for parameter in layer.parameters()} == {dtype}
    assert layer.state_dict()["_num_global_experts"].dtype == torch.int64


def test_fp64_is_fp64_from_end_to_end():
    torch.set_default_dtype(torch.float64)
    layer = make_layer(capacity_factor=0.0)
    tokens = random_values((12, 6))
    # A change far below fp32's resolution goes through every stage.
    change = layer(tokens * (1 + 1e-13)) - layer(tokens)
    assert change.abs().max() > 0
    assert change.abs().max() < 1e-11
    assert layer.l_aux.dtype == torch.float64


def test_routing_weights_of_half_layers_are_fp32():
    # With experts that give 1, the output is the sum of the weights rounded once: exactly 1 when normalised.
    layer = make_layer(num_experts=4, top_k=4, capacity_factor=0.0).bfloat16()
    with torch.no_grad():
        layer.experts.batched_fc2_w.zero_()
        layer.experts.batched_fc2_bias.fill_(1)
    assert layer(TOKENS.bfloat16()).eq(1).all()


def test_no_grad_and_inference_mode():
    layer = make_layer()
    expected = layer(TOKENS)
    with torch.no_grad():
        output = layer(TOKENS)
    assert torch.equal(output, expected)
    assert not output.requires_grad
    with torch.inference_mode():
        output = layer(TOKENS)
    assert torch.equal(output, expected)
