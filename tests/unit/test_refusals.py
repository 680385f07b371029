"""Combinations of options that have no meaning are refused, and scalars of other libraries are understood."""

import numpy as np
import pytest
import torch

from tutel import moe

TOKENS = torch.randn(3, 4)
MEGATRON = {"type": "megatron"}
FFN = {"type": "ffn", "count_per_node": 1, "hidden_size_per_expert": 8}


@pytest.mark.parametrize("option", [{"gate_index": 1}, {"capacity_factor": 1.0}, {"top_k": 1}])
def test_megatron_has_no_routing(option):
    layer = moe.moe_layer(MEGATRON, 4, FFN)
    with pytest.raises(ValueError, match="do not apply"):
        layer(TOKENS, **option)


def test_megatron_leaves_out_its_expert_when_told(monkeypatch):
    monkeypatch.setenv("SKIP_EXPERT", "1")
    output = moe.moe_layer(MEGATRON, 4, FFN)(TOKENS)
    assert torch.equal(output, TOKENS)
    assert output.data_ptr() != TOKENS.data_ptr()


def test_dropout_inside_a_users_function_is_the_users():
    experts = {**FFN, "implicit_dropout_p": 0.5, "fused_custom_fn": lambda _experts, x: x}
    with pytest.raises(ValueError, match="only one of 'fused_custom_fn' or 'implicit_dropout_p'"):
        moe.moe_layer({"type": "top"}, 4, experts)


@pytest.mark.parametrize("count", ["two", torch.tensor([1, 2])])
def test_a_state_whose_count_is_no_number_is_refused(count):
    layer = moe.moe_layer({"type": "top"}, 4, FFN)
    with pytest.raises(RuntimeError, match="'_num_global_experts' must be the number of experts"):
        layer.load_state_dict({**layer.state_dict(), "_num_global_experts": count})


def test_numpy_scalars_are_numbers():
    layer = moe.moe_layer({"type": "top", "k": np.int64(1), "capacity_factor": np.float32(1.25)}, 4, FFN)
    assert layer.gates[0].capacity_factor == 1.25


def test_a_switch_with_several_values_is_refused():
    with pytest.raises(TypeError, match="is_postscore must be True or False"):
        moe.moe_layer({"type": "top"}, 4, FFN, is_postscore=torch.tensor([True, False]))
