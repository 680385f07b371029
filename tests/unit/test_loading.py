"""States of layers, copies, casts, parametrisation, checkpointing: what surrounds a layer in training."""

import copy
import pickle
import weakref

import pytest
import torch
from matrix import cases, user
from reference import make_layer, random_values, wide
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint as recompute

from tutel import checkpoint, moe

T = 12
KINDS = [
    (gate, experts) for gate in cases.GATES for experts in (cases.FFN_KINDS if gate == "megatron" else cases.KINDS)
]
kinds = pytest.mark.parametrize(("gate", "experts"), KINDS)


def tokens_of(dtype=torch.float32, width=6, seed=8):
    return random_values((T, width), dtype, seed=seed)


def step(layer, tokens, call=None):
    layer.zero_grad()
    leaf = tokens.clone().requires_grad_()
    output = (call or layer)(leaf)
    (wide(output).square().sum() + wide(layer.l_aux)).backward()
    return [output.detach(), leaf.grad, *(p.grad for p in layer.parameters())]


def assert_same(left, right):
    for one, other in zip(left, right, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


# --- Today's state ---------------------------------------------------------------------------------------------------


@kinds
def test_state_copies_and_casts(gate, experts):
    """Of every kind of layer: strict state dict, deepcopy, pickle after a forward, and every cast."""
    layer, tokens = cases.make_layer(gate, experts), tokens_of()
    expected = step(layer, tokens)
    other = cases.make_layer(gate, experts)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(layer.state_dict(), strict=True)
    for again in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert again.experts is not layer.experts
        assert_same(step(again, tokens), expected)
    copied = copy.deepcopy(layer)
    copied.load_state_dict(other.state_dict())  # the hooks of a copy are its own
    for cast, dtype in [
        (layer.half, torch.float16),
        (layer.bfloat16, torch.bfloat16),
        (layer.double, torch.float64),
        (lambda: layer.to(torch.float32), torch.float32),
    ]:
        cast()
        assert {p.dtype for p in layer.parameters()} == {dtype}
        assert layer._num_global_experts.dtype == torch.int64
        results = step(layer, tokens.to(dtype))
        assert {r.dtype for r in results if r is not None} == {dtype}
        assert not any(r.isnan().any() for r in results if r is not None)


def test_names_and_shapes():
    state = make_layer(experts={"output_dim": 3}, num_experts=4, hidden_size=5, model_dim=6).state_dict()
    assert {key: list(value.shape) for key, value in state.items()} == {
        "_num_global_experts": [], "gates.0.wg.weight": [4, 6],
        "experts.batched_fc1_w": [4, 5, 6], "experts.batched_fc2_w": [4, 5, 3],
        "experts.batched_fc1_bias": [4, 5], "experts.batched_fc2_bias": [4, 3],
    }  # fmt: skip
    assert state["_num_global_experts"].dtype == torch.int64


@pytest.mark.parametrize("prefix", ["", "0."])
def test_missing_count_warns(prefix):
    layer = make_layer() if not prefix else torch.nn.Sequential(make_layer())
    state = layer.state_dict()
    del state[prefix + "_num_global_experts"]
    before = dict(state)
    with pytest.warns(
        UserWarning, match=rf"does not say for how many experts.*{prefix}_num_global_experts.*taken to be 4"
    ):
        layer.load_state_dict(state, strict=True)
    assert state.keys() == before.keys()


@pytest.mark.parametrize("strict", [True, False])
def test_other_count_is_an_error(strict):
    with pytest.raises(RuntimeError, match="state dict is for 3 experts, but the layer has 4"):
        make_layer().load_state_dict(make_layer(num_experts=3).state_dict(), strict=strict)


def test_missing_expert_parameter():
    layer = make_layer()
    state = layer.state_dict()
    kept = layer.experts.batched_fc1_bias.clone()
    del state["experts.batched_fc1_bias"]
    warning = r"has no 'experts\.batched_fc1_bias': the experts keep theirs"
    with pytest.warns(UserWarning, match=warning), pytest.raises(RuntimeError, match=r"Missing key.*batched_fc1_bias"):
        layer.load_state_dict(state)
    with pytest.warns(UserWarning, match=warning):
        layer.load_state_dict(state, strict=False)
    with pytest.warns(UserWarning, match=r"has no '0\.experts\.batched_fc1_bias'"):
        torch.nn.Sequential(layer).load_state_dict({f"0.{key}": value for key, value in state.items()}, strict=False)
    assert torch.equal(layer.experts.batched_fc1_bias, kept)


def test_wrong_sizes_name_both():
    with pytest.raises(RuntimeError, match=r"batched_fc1_w.*\[4, 9, 6\].*\[4, 5, 6\]"):
        make_layer().load_state_dict(make_layer(hidden_size=9).state_dict())


@pytest.mark.parametrize("experts", ["ffn", "llama_ffn"])
def test_as_many_elements_are_reshaped(experts):
    layer, tokens = cases.make_layer("top", experts), tokens_of()
    expected = layer(tokens)
    flat = {key: value.flatten() if key.startswith("experts.") else value for key, value in layer.state_dict().items()}
    flat["_num_global_experts"] = torch.tensor([4])
    other = cases.make_layer("top", experts)
    with torch.no_grad():
        for parameter in other.experts.parameters():
            parameter.zero_()
    other.load_state_dict(flat)
    assert torch.equal(other(tokens), expected)
    assert flat["_num_global_experts"].shape == (1,)


# --- Older layouts ---------------------------------------------------------------------------------------------------


def by_hand(layer, layout):
    """The specification's description of an older state."""
    experts, one = layer.experts, layer.num_local_experts == 1
    fc1 = experts.batched_fc1_w.detach()
    fc1 = fc1.transpose(1, 2) if layout == "v0.1.4" else fc1
    biases = {f"fc{i}_bias": getattr(experts, f"batched_fc{i}_bias").detach().unsqueeze(1) for i in (1, 2)}
    old = {"fc1_weight": fc1, "fc2_weight": experts.batched_fc2_w.detach(), **biases}
    old = {name: value[0] if one and layout == "v0.1.4" else value for name, value in old.items()}
    rest = {key: value for key, value in layer.state_dict().items() if not key.startswith("experts.")}
    return {**rest, **{f"experts.0.{name}": value.clone() for name, value in old.items()}}


def shapes(state):
    return {key: list(value.shape) for key, value in state.items()}


layouts = pytest.mark.parametrize("layout", ["v0.1.4", "v0.1.5"])
counts = pytest.mark.parametrize("count", [1, 4])


@layouts
@counts
@pytest.mark.parametrize("copies", [1, 2])
def test_older_layouts_are_told_by_their_shapes(layout, count, copies):
    options = {"num_experts": count, "top_k": 1, "experts": {"fc1_copies": copies}}
    options["experts"] |= {"activation_fn": user.gated} if copies == 2 else {}
    layer, tokens = make_layer(**options), tokens_of()
    state = by_hand(layer, layout)
    written = checkpoint.legacy_state_dict(layer, layout=layout)
    assert shapes(written) == shapes(state)
    assert all(torch.equal(written[key], state[key]) for key in state)
    for how in ("shapes", "said"):
        other = make_layer(**options, seeds=(8, 8))
        if how == "shapes":
            with pytest.warns(UserWarning, match=rf"experts\.0\.\*.*layout of {layout} and are converted"):
                other.load_state_dict(state)
        else:
            checkpoint.load_legacy_state_dict(other, state, layout=layout)
        assert torch.equal(other(tokens), layer(tokens))


@layouts
@counts
def test_layouts_that_shapes_cannot_tell_apart_must_be_said(layout, count):
    options = {"num_experts": count, "top_k": 1, "hidden_size": 6, "model_dim": 6}
    layer, other, tokens = make_layer(**options), make_layer(**options, seeds=(8, 8)), tokens_of()
    state = by_hand(layer, layout)
    way_out = r"'v0\.1\.4' and 'v0\.1\.5' alike.*load_legacy_state_dict\(layer, state, layout=\.\.\.\)"
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=way_out):
            other.load_state_dict(state, strict=strict)
    checkpoint.load_legacy_state_dict(other, state, layout=layout)
    assert torch.equal(other(tokens), layer(tokens))


def test_an_older_layout_of_other_sizes():
    state = by_hand(make_layer(hidden_size=9), "v0.1.4")
    with pytest.raises(
        RuntimeError, match=r"\[4, 6, 9\], expected \[4, 6, 5\] \(v0\.1\.4\) or \[4, 5, 6\] \(v0\.1\.5\)"
    ):
        make_layer().load_state_dict(state)


# --- In training -----------------------------------------------------------------------------------------------------


class Doubled(torch.nn.Module):
    def forward(self, weight):
        return weight * 2


@pytest.mark.parametrize("experts", ["ffn", "fused"])
def test_parametrized_weights(experts):
    layer, tokens = cases.make_layer("top", experts), tokens_of()
    doubled = copy.deepcopy(layer)
    with torch.no_grad():
        doubled.experts.batched_fc1_w.mul_(2)
        doubled.gates[0].wg.weight.mul_(2)
    expected, _, *_ = step(doubled, tokens)
    parametrize.register_parametrization(layer.experts, "batched_fc1_w", Doubled())
    parametrize.register_parametrization(layer.gates[0].wg, "weight", Doubled())
    assert torch.equal(step(layer, tokens)[0], expected)
    original = layer.experts.parametrizations.batched_fc1_w.original.grad
    torch.testing.assert_close(original, 2 * doubled.experts.batched_fc1_w.grad)
    other = cases.make_layer("top", experts)
    parametrize.register_parametrization(other.experts, "batched_fc1_w", Doubled())
    parametrize.register_parametrization(other.gates[0].wg, "weight", Doubled())
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(tokens), expected)


@kinds
def test_gradient_accumulation_and_double_use(gate, experts):
    """Two forwards add up, whether each has its backward or both have one."""
    layer = cases.make_layer(gate, experts, dtype=torch.float64)
    first, second = tokens_of(torch.float64), tokens_of(torch.float64, seed=9)
    apart = [left + right for left, right in zip(step(layer, first)[2:], step(layer, second)[2:], strict=True)]

    def both(leaf):
        left = layer(leaf)
        aux = layer.l_aux
        right = layer(second)
        return left.square().sum() + right.square().sum() + aux + layer.l_aux

    layer.zero_grad()
    both(first).backward()
    for grad, parameter in zip(apart, layer.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, grad)
    layer.zero_grad()
    for tokens in (first, second):
        output = layer(tokens)
        (output.square().sum() + output.l_aux).backward()
    for grad, parameter in zip(apart, layer.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, grad)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("experts", ["ffn", "custom", "module_list"])
def test_recomputation_routes_identically(use_reentrant, experts):
    layer, tokens = cases.make_layer("top", experts, capacity="positive"), tokens_of()
    layer.gates[0].gate_noise = 5.0
    logits = []
    layer.gates[0].register_forward_hook(lambda *_: logits.append(torch.get_rng_state()))

    def one_step(call):
        layer.zero_grad()
        torch.manual_seed(5)
        leaf = tokens.clone().requires_grad_()
        output = call(leaf)
        # A re-entrant checkpoint gives gradients of what the layer returns only.
        (output.square().sum() + (0 if use_reentrant else layer.l_aux)).backward()
        return [output.detach(), leaf.grad, *(p.grad for p in layer.parameters())]

    expected = one_step(layer)
    # Other noise would have changed choices and weights, and so the gradients.
    assert_same(one_step(lambda leaf: recompute(layer, leaf, use_reentrant=use_reentrant)), expected)
    assert len(logits) == 3
    assert all(torch.equal(state, logits[0]) for state in logits)


@kinds
def test_autocast(gate, experts):
    layer, tokens = cases.make_layer(gate, experts), tokens_of()
    exact = layer(tokens)
    tokens.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(tokens)
    (output.sum() + layer.l_aux).backward()
    assert output.dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters() if p.grad is not None)
    assert layer.l_aux.dtype == torch.float32
    torch.testing.assert_close(output, exact, rtol=0.1, atol=0.05 * exact.abs().max().item())
    if experts not in ("relu",):
        assert not torch.equal(output, exact), "the experts are meant to compute in bfloat16"


def test_l_aux_holds_no_output():
    layer = moe.moe_layer({"k": 1}, 6, {"hidden_size_per_expert": 5})
    gone = weakref.ref(layer(tokens_of()))
    assert gone() is None
