"""States for torch.distributed.checkpoint on one rank without a process group; several ranks: tests/distributed."""

import copy

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from tutel.checkpoint import (
    load_sharded_optimizer_state_dict,
    load_sharded_state_dict,
    sharded_optimizer_state_dict,
    sharded_state_dict,
)

from tutel import checkpoint, moe

D, H, E = 6, 8, 4
FFN = {"type": "ffn", "count_per_node": E, "hidden_size_per_expert": H}


def make(experts=FFN):
    model = nn.Sequential(nn.Linear(D, D), moe.moe_layer({"type": "top", "k": 2}, D, experts))
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def step(model, optimizer, seed=0):
    torch.manual_seed(seed)
    model(torch.randn(5, D)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def assert_same(left, right):
    for one, other in zip(left.parameters(), right.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore:TypedStorage is deprecated")
def test_a_run_goes_on_as_if_it_had_not_stopped(tmp_path):
    model, optimizer = make()
    step(model, optimizer)
    state = {"model": sharded_state_dict(model), "optimizer": sharded_optimizer_state_dict(model, optimizer)}
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    step(model, optimizer, 1)
    again, its_optimizer = make()
    state = {"model": sharded_state_dict(again), "optimizer": sharded_optimizer_state_dict(again, its_optimizer)}
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    load_sharded_state_dict(again, state["model"])
    load_sharded_optimizer_state_dict(again, its_optimizer, state["optimizer"])
    step(again, its_optimizer, 1)
    assert_same(model, again)


def test_the_state_is_the_models_memory_but_for_the_number_of_experts():
    model, _ = make()
    state = sharded_state_dict(model)
    assert state["1.experts.batched_fc1_w"].data_ptr() == model[1].experts.batched_fc1_w.data_ptr()
    assert state["1._num_global_experts"].data_ptr() != model[1]._num_global_experts.data_ptr()
    state["1._num_global_experts"].fill_(7)
    with pytest.raises(RuntimeError, match="the state dict is for 7 experts, but the layer has 4"):
        load_sharded_state_dict(model, state)


def test_hidden_units_that_stand_there_twice():
    """They get a dimension of their own, in which ranks' parts are blocks; plain states of that form load as well."""
    experts = {**FFN, "fc1_copies": 2, "activation_fn": lambda hidden: hidden[..., :H] * hidden[..., H:]}
    model, optimizer = make(experts)
    step(model, optimizer)
    state = sharded_state_dict(model)
    assert state["1.experts.batched_fc1_w"].shape == (E, 2, H, D)
    assert sharded_optimizer_state_dict(model, optimizer)["state.1.experts.batched_fc1_bias.exp_avg"].shape == (E, 2, H)
    again, _ = make(experts)
    load_sharded_state_dict(again, state)
    assert_same(model, again)
    again.load_state_dict(state)  # the layer itself reshapes them
    assert_same(model, again)


def test_one_expert_without_a_gate():
    model = nn.Sequential(moe.moe_layer({"type": "megatron"}, D, {"hidden_size_per_expert": H}))
    state = sharded_state_dict(model)
    assert state["0.experts.batched_fc2_bias"].data_ptr() == model[0].experts.batched_fc2_bias.data_ptr()
    load_sharded_state_dict(model, state)
    with pytest.raises(ValueError, match=r"0\._num_global_experts must be 1, since .*, got 2"):
        load_sharded_state_dict(model, {**state, "0._num_global_experts": torch.tensor(2)})


def test_a_fresh_optimizer_stays_fresh():
    model, optimizer = make()
    twin = copy.deepcopy(model)
    its_optimizer = torch.optim.AdamW(twin.parameters(), lr=0.1)
    model[0].weight.grad = torch.ones(D, D)
    state = sharded_optimizer_state_dict(model, optimizer)
    assert state["state.0.weight.step"] == 0
    assert not state["state.1.experts.batched_fc1_w.exp_avg"].any()
    assert not optimizer.state
    assert torch.equal(model[0].weight.grad, torch.ones(D, D))
    assert_same(model, twin)
    model.zero_grad()
    step(model, optimizer)
    step(twin, its_optimizer)
    assert_same(model, twin)


def test_loading_where_there_are_gradients():
    """torch starts no state there, and would load nothing without a word."""
    model, optimizer = make()
    step(model, optimizer)
    state = sharded_optimizer_state_dict(model, optimizer)
    again, its_optimizer = make()
    again(torch.randn(5, D)).sum().backward()
    gradient = again[0].weight.grad.clone()
    load_sharded_optimizer_state_dict(again, its_optimizer, state)
    assert torch.equal(again[0].weight.grad, gradient)
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(optimizer.state[one]["exp_avg_sq"], its_optimizer.state[other]["exp_avg_sq"])


def test_groups_of_parameters():
    """Options of each parameter are kept by its name, however parameters are grouped."""
    model, _ = make()
    gates = [model[1].gates[0].wg.weight]
    others = [parameter for parameter in model.parameters() if parameter is not gates[0]]
    optimizer = torch.optim.SGD([{"params": gates, "lr": 0.5}, {"params": others}], lr=0.1, momentum=0.9)
    step(model, optimizer)
    state = sharded_optimizer_state_dict(model, optimizer)
    assert (state["param_groups.1.gates.0.wg.weight.lr"], state["param_groups.0.bias.lr"]) == (0.5, 0.1)
    other = torch.optim.SGD([{"params": others}, {"params": gates}], lr=1.0, momentum=0.1)
    load_sharded_optimizer_state_dict(model, other, state)
    assert [options["lr"] for options in other.param_groups] == [0.1, 0.5]
    assert other.param_groups[0]["momentum"] == 0.9


def test_experts_without_a_step():
    model, optimizer = make()
    model[0](torch.randn(5, D)).sum().backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"no state for 1\.experts\.batched_fc1_bias, .*, which had no gradient yet"):
        sharded_optimizer_state_dict(model, optimizer)
    model[1].experts.requires_grad_(False)
    assert "state.0.weight.exp_avg" in sharded_optimizer_state_dict(model, optimizer)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.ones(3, H, D), r"1\.experts\.batched_fc1_w must have shape \[4, 8, 6\] over all ranks, got \[3, 8, 6\]"),
        (3, "over all ranks, got int"),
    ],
)
def test_values_that_do_not_fit(value, message):
    model, optimizer = make()
    with pytest.raises(ValueError, match=message):
        load_sharded_state_dict(model, {**sharded_state_dict(model), "1.experts.batched_fc1_w": value})
    state = sharded_optimizer_state_dict(model, optimizer)
    if isinstance(value, torch.Tensor):
        with pytest.raises(ValueError, match=r"it is not known how|must have shape"):
            load_sharded_optimizer_state_dict(
                model, optimizer, {**state, "state.1.experts.batched_fc1_w.exp_avg": value}
            )


def test_keys_that_do_not_fit():
    model, _ = make()
    state = sharded_state_dict(model)
    del state["0.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"0\.weight\""):
        load_sharded_state_dict(model, state)
    load_sharded_state_dict(model, state, strict=False)


def test_values_of_whole_parameters_that_mix_experts():
    """Adafactor's of biases [e, H]: no rank could tell which part is whose."""
    model, _ = make()
    optimizer = torch.optim.Adafactor(model.parameters())
    step(model, optimizer)
    with pytest.raises(ValueError, match=r"fc1_bias\.col_var has shape \[1, 8\], and it is not known how"):
        sharded_optimizer_state_dict(model, optimizer)


def test_only_known_names():
    assert all(hasattr(checkpoint, name) for name in checkpoint.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'sharded_nothing'"):
        _ = checkpoint.sharded_nothing
