"""Every option of the layer, of a call and of the environment; docs/options.md names exactly these."""

import inspect
import re
from pathlib import Path

import pytest
import torch
from matrix import user
from reference import make_layer, random_values
from torch.nn import functional as F

from tutel import config, distributed, env, moe

PAGE = (Path(__file__).parents[2] / "docs" / "options.md").read_text()
D, E, T = 6, 4, 12


def tokens_of(dtype=torch.float32):
    return random_values((T, D), dtype, seed=6)


def same(left, right):
    assert torch.equal(left, right)


# --- The page --------------------------------------------------------------------------------------------------------


def named_in(heading):
    """The options that a section's tables have rows for."""
    section = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#|\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert section, f"docs/options.md has no section {heading!r}"
    first = re.findall(r"^\| (`[^|]*`) \|", section.group(1), re.MULTILINE)
    return {name for cell in first for name in re.findall(r"`(\w+)`", cell)}


def arguments(function):
    parameters = inspect.signature(function).parameters.values()
    return {p.name for p in parameters if p.kind is not p.VAR_KEYWORD} - {"self"}


def test_page_of_the_constructor():
    assert named_in("Constructor") == arguments(moe.moe_layer.__init__)
    assert named_in("Deprecated arguments") == set(config.layer._DEPRECATED)


def test_page_of_a_call():
    assert named_in("Call") == arguments(moe.moe_layer.forward)


@pytest.mark.parametrize("module", ["gates", "experts"])
def test_page_of_gates_and_experts(module):
    tables = getattr(config, module)
    for kind, options in tables._OPTIONS.items():
        title = {"gates": f"Gate `{kind}`", "experts": f"Experts `{kind}`"}[module]
        assert named_in(title) == options - {"type"}, title
    assert set(tables._KINDS) == {*tables._OPTIONS, "custom"}


def test_page_of_custom_classes():
    assert named_in("Gate `custom`") == {"module", "capacity_factor", "gate_noise", "batch_prioritized_routing"}
    assert named_in("Experts `custom`") == {"module", "count_per_node", "num_experts_per_device"}


def test_page_of_the_helpers():
    names = re.findall(r"^\| `(\w+)", PAGE.split("## Beyond the layer")[1], re.MULTILINE)
    assert {*names} == {*distributed.__all__} - {"Division"}


def test_page_of_the_environment():
    read = set(re.findall(r"``([A-Z][A-Z_0-9]+)(?:=\w+)?``", inspect.getsource(env)))
    assert named_in("Environment") == read


# --- The layer -------------------------------------------------------------------------------------------------------


def test_is_postscore():
    layer = make_layer(capacity_factor=0.0, is_postscore=False).double()
    tokens, experts = tokens_of(torch.float64), layer.experts
    scores, ids = torch.softmax(layer.gates[0].wg(tokens), 1).topk(2)
    weights, expected = scores / scores.sum(1, keepdim=True), torch.zeros_like(tokens)
    for t in range(T):
        for j, e in enumerate(ids[t].tolist()):
            hidden = experts.batched_fc1_w[e] @ (weights[t, j] * tokens[t]) + experts.batched_fc1_bias[e]
            expected[t] += torch.relu(hidden) @ experts.batched_fc2_w[e] + experts.batched_fc2_bias[e]
    torch.testing.assert_close(layer(tokens), expected)


def test_result_func():
    layer = make_layer(result_func=lambda output: (output, output.l_aux))
    output, l_aux = layer(tokens_of())
    same(output, make_layer()(tokens_of()))
    assert l_aux is layer.l_aux


def test_scan_expert_func_may_mark_parameters():
    layer = make_layer(scan_expert_func=lambda name, parameter: setattr(parameter, "skip_allreduce", name))
    assert all(parameter.skip_allreduce == name for name, parameter in layer.experts.named_parameters())
    assert not any(hasattr(parameter, "skip_allreduce") for parameter in layer.gates.parameters())


@pytest.mark.parametrize("seeds", [(11, 22, 33), (11, 22), (11, None, 33), (None, 22, None), (None, None), None])
def test_seeds(seeds):
    shared, local, after = (*(seeds or (None, None)), None)[:3]
    torch.manual_seed(77)
    layer = make_layer(seeds=seeds)
    drawn = torch.randn(3)

    torch.manual_seed(77)
    if local is not None:
        torch.manual_seed(local)
    for e in range(E):
        same(layer.experts.batched_fc1_w[e], torch.nn.Linear(D, 5).weight)
        same(layer.experts.batched_fc2_w[e], torch.nn.Linear(5, D).weight.T)
    if shared is not None:
        torch.manual_seed(shared)
    same(layer.gates[0].wg.weight, torch.nn.Linear(D, E, bias=False).weight)
    if after is not None:
        torch.manual_seed(after)
    same(drawn, torch.randn(3))


@pytest.mark.parametrize("value", [True, False, 1, 0])
def test_fp32_gate_of_the_layer_is_deprecated(value):
    with pytest.warns(DeprecationWarning, match=r"moe_layer\(fp32_gate=\) is deprecated: set 'fp32_gate' in gate_type"):
        layer = make_layer(fp32_gate=value)
    assert layer.gates[0].fp32 == bool(value)
    with pytest.warns(DeprecationWarning):
        assert make_layer(gate={"fp32_gate": True}, fp32_gate=False).gates[0].fp32


def test_pad_samples_is_deprecated():
    with pytest.warns(DeprecationWarning, match=r"moe_layer\(pad_samples=\) is deprecated: batches may have any size"):
        layer = make_layer(pad_samples=True)
    for count in (3, 9, 1, 30):
        assert layer(torch.randn(count, D)).shape == (count, D)


@pytest.mark.parametrize(
    ("parallel_type", "degree"),
    [("data", 1), ("model", 1), ("auto", 1), ("adaptive:0", 0), ("adaptive:1", 1), ("adaptive:8", 1)],
)
def test_parallel_type(parallel_type, degree):
    layer = make_layer(parallel_type=parallel_type)
    assert (layer.adaptive_degree, layer.valid_rs) == (degree, [0, 1])
    same(layer(tokens_of()), make_layer()(tokens_of()))


@pytest.mark.parametrize("option", [{"a2a_ffn_overlap_degree": 2}, {"use_2dh": True}, {"group": None}])
def test_options_of_an_exchange_change_nothing_on_one_rank(option):
    layer = make_layer(**option)
    same(layer(tokens_of()), make_layer()(tokens_of()))
    assert layer.a2a_ffn_overlap_degree == option.get("a2a_ffn_overlap_degree", 1)


def test_attributes():
    layer = make_layer()
    assert (layer.num_global_experts, layer.num_local_experts, layer.sharded_count) == (E, E, 1)
    assert (layer.world_size, layer.group, layer.model_dim) == (1, None, D)
    assert (layer.l_aux, layer.dispatch_count) == (None, None)
    assert moe.moe_layer.global_expert_count(3) == 3
    assert [name for name, _ in layer.get_parameter_iterator("gate")] == ["0.wg.weight"]
    output = layer(tokens_of())
    assert output.l_aux is layer.l_aux
    ids = layer.gates[0].wg(tokens_of()).topk(2).indices
    assert layer.dispatch_count.tolist() == torch.bincount(ids.flatten(), minlength=E).tolist()


# --- One call --------------------------------------------------------------------------------------------------------

OVERRIDES = {"capacity_factor": 0.25, "top_k": 1, "a2a_ffn_overlap_degree": 3, "adaptive_r": 0, "megablocks_size": 4,
             "inequivalent_tokens": True}  # fmt: skip


@pytest.mark.parametrize("name", OVERRIDES)
def test_an_override_holds_for_one_call(name):
    layer, tokens = make_layer(gate={"capacity_factor": 2.0}), tokens_of()
    before = layer(tokens)
    overridden = layer(tokens, **{name: OVERRIDES[name]})
    assert torch.equal(before, overridden) != (name in ("capacity_factor", "top_k"))
    same(layer(tokens), before)
    if name in ("capacity_factor", "top_k"):
        gate = {"capacity_factor": 2.0} | {{"top_k": "k"}.get(name, name): OVERRIDES[name]}
        same(overridden, make_layer(gate=gate)(tokens))


@pytest.mark.parametrize(("name", "attribute"), [("a2a_ffn_overlap_degree", None), ("adaptive_r", "adaptive_degree")])
def test_degrees_report_the_last_forward(name, attribute):
    layer, attribute = make_layer(), attribute or name
    layer(tokens_of(), **{name: OVERRIDES[name]})
    assert getattr(layer, attribute) == OVERRIDES[name]
    layer(tokens_of())
    assert getattr(layer, attribute) == 1


def test_reserve_dims():
    layer = make_layer()
    x = random_values((2, 6, 2, 3), torch.float32)
    output = layer(x, reserve_dims=2)
    assert output.shape == x.shape
    same(output.view(T, D), layer(x.view(T, D)))
    assert make_layer(experts={"output_dim": 5})(x, reserve_dims=2).shape == (2, 6, 5)


def test_leading_dimensions_and_dtype():
    layer = make_layer()
    for shape in [(T, D), (3, 4, D), (2, 3, 2, D), (1, T, 1, D)]:
        same(layer(tokens_of().view(shape)).view(T, D), layer(tokens_of()))
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        assert layer(tokens_of(dtype)).dtype == dtype


# --- Environment -----------------------------------------------------------------------------------------------------


def test_skip_moe(monkeypatch):
    monkeypatch.setenv("SKIP_MOE", "1")
    layer, tokens = make_layer(result_func=lambda output: (output,)), tokens_of().requires_grad_()
    (output,) = layer(tokens)
    same(output, tokens)
    assert output is not tokens
    assert output.l_aux.item() == 0
    output.sum().backward()
    same(tokens.grad, torch.ones_like(tokens))


@pytest.mark.parametrize("experts", [{}, {"fused_custom_fn": user.fused}], ids=["ragged", "padded"])
def test_skip_expert(monkeypatch, experts):
    monkeypatch.setenv("SKIP_EXPERT", "1")
    torch.testing.assert_close(make_layer(capacity_factor=0.0, experts=experts)(tokens_of()), tokens_of())


def test_ones_gate(monkeypatch):
    with_weights = make_layer(capacity_factor=0.0).double()
    monkeypatch.setenv("ONES_GATE", "1")
    layer, tokens = make_layer(capacity_factor=0.0).double(), tokens_of(torch.float64)
    experts, expected = layer.experts, torch.zeros_like(tokens)
    for t, ids in enumerate(layer.gates[0].wg(tokens).topk(2).indices.tolist()):
        for e in ids:
            hidden = F.relu(experts.batched_fc1_w[e] @ tokens[t] + experts.batched_fc1_bias[e])
            expected[t] += hidden @ experts.batched_fc2_w[e] + experts.batched_fc2_bias[e]
    torch.testing.assert_close(layer(tokens), expected)
    with_weights(tokens)
    same(layer.l_aux, with_weights.l_aux)
