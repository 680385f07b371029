"""Bad options of every kind of gate and experts, bad modules of users, bad states: what is wrong, what is allowed.

Those of the plain layer, of its input and of operators: test_bad_*.py.
"""

import copy
import warnings

import pytest
import torch
from matrix import user
from reference import make_layer
from tutel.impls.losses import gshard_loss, load_importance_loss

from tutel import checkpoint, moe

TOP, COSINE, MEGATRON = {"type": "top"}, {"type": "cosine_top"}, {"type": "megatron"}
GATE = {"type": "custom", "module": user.Gate}
FFN = {"count_per_node": 4, "hidden_size_per_expert": 5}
ONE = {"hidden_size_per_expert": 5}
LLAMA, ATTENTION = {**FFN, "type": "llama_ffn"}, {"type": "attention", "attention_fn": user.linear_attention}
CUSTOM = {"type": "custom", "module": user.Experts, "count_per_node": 4}
MODULE = torch.nn.Linear(6, 6)


def no_module(**options):
    return "text"


class NoTopK(torch.nn.Module):
    def __init__(self, model_dim, num_global_experts, **options):
        super().__init__()


class TopK(NoTopK):
    def __init__(self, top_k, **options):
        super().__init__(**options)
        self.top_k = top_k


GATES = "'top', 'cosine_top', 'megatron' or 'custom'"
EXPERTS = "'ffn', 'attention', 'llama_ffn' or 'custom'"
NO_MODULE = r"\['module'\] must make a torch\.nn\.Module, got str from no_module"
NOT_CALLABLE = r"must be callable.*, got "
UNKNOWN_TOP = (
    r"unknown option 'proj_dim'; allowed are batch_prioritized_routing, capacity_factor, fp32_gate, gate_noise, "
    r"input_dropout_p, k or type"
)
UNKNOWN_COSINE = (
    r"unknown option 'input_dropout_p'; allowed are batch_prioritized_routing, capacity_factor, fp32_gate, gate_noise, "
    r"init_t, k, proj_dim or type"
)
UNKNOWN_LLAMA = (
    r"unknown option 'output_dim'; allowed are activation_fn, count_per_node, hidden_size_per_expert, "
    r"num_experts_per_device or type"
)
UNKNOWN_ATTENTION = (
    r"unknown option 'hidden_size_per_expert'; allowed are attention_fn, count_per_node, fc1_copies, has_fc1_bias, "
    r"has_fc2_bias, implicit_dropout_p, num_experts_per_device, output_dim or type"
)
UNKNOWN_FFN = (
    r"unknown option 'attention_fn'; allowed are activation_fn, activation_fn_with_self, count_per_node, fc1_copies, "
    r"fused_custom_fn, has_fc1_bias, has_fc2_bias, hidden_size_per_expert, implicit_dropout_p, num_experts_per_device, "
    r"output_dim or type"
)

# gate_type, experts, further arguments, exception, message
MADE = [
    # Unknown options of each kind list the valid ones.
    ({**TOP, "proj_dim": 3}, FFN, {}, ValueError, UNKNOWN_TOP),
    ({**COSINE, "input_dropout_p": 0.1}, FFN, {}, ValueError, UNKNOWN_COSINE),
    ({**MEGATRON, "k": 1}, ONE, {}, ValueError, r"gate_type has unknown option 'k'; allowed are type"),
    (TOP, {**FFN, "attention_fn": torch.tanh}, {}, ValueError, UNKNOWN_FFN),
    (TOP, {**LLAMA, "output_dim": 3}, {}, ValueError, UNKNOWN_LLAMA),
    (TOP, {**ATTENTION, "hidden_size_per_expert": 3}, {}, ValueError, UNKNOWN_ATTENTION),
    (TOP, FFN, {"gates": 1}, TypeError, r"moe_layer has no argument 'gates'; allowed are gate_type, .* or wire_dtype$"),
    ({"type": "cosine"}, FFN, {}, ValueError, rf"gate_type\['type'\] must be {GATES}, got 'cosine'"),
    (TOP, {"type": "glu"}, {}, ValueError, rf"experts\['type'\] must be {EXPERTS}, got 'glu'"),
    ("TopGate", FFN, {}, ValueError, r"must have the form 'Top<k>Gate', got 'TopGate'"),
    # Gate top.
    ({**TOP, "input_dropout_p": 1.0}, FFN, {}, ValueError, r"gate_type\['input_dropout_p'\] must be below 1, got 1\.0"),
    ({**TOP, "input_dropout_p": -0.1}, FFN, {}, ValueError, r"input_dropout_p'\] must be at least 0\.0, got -0\.1"),
    ({**TOP, "input_dropout_p": "half"}, FFN, {}, TypeError, r"input_dropout_p'\] must be a number, got 'half'"),
    # Gate cosine_top.
    ({**COSINE, "proj_dim": 0}, FFN, {}, ValueError, r"gate_type\['proj_dim'\] must be at least 1, got 0"),
    ({**COSINE, "proj_dim": 2.5}, FFN, {}, TypeError, r"proj_dim'\] must be an integer, got 2\.5"),
    ({**COSINE, "init_t": 0}, FFN, {}, ValueError, r"gate_type\['init_t'\] must be positive, got 0"),
    ({**COSINE, "init_t": -1.0}, FFN, {}, ValueError, r"init_t'\] must be positive, got -1\.0"),
    ({**COSINE, "init_t": None}, FFN, {}, TypeError, r"init_t'\] must be a number, got None"),
    ({**COSINE, "fp32_gate": "fp32"}, FFN, {}, TypeError, r"fp32_gate'\] must be True or False, got 'fp32'"),
    ([TOP, {**COSINE, "init_t": 0}], FFN, {}, ValueError, r"gate_type\[1\]\['init_t'\] must be positive, got 0"),
    # Gate custom.
    ({"type": "custom"}, FFN, {}, ValueError, r"gate_type of type 'custom' must have 'module', the gate's class"),
    ({**GATE, "module": "Gate"}, FFN, {}, TypeError, rf"gate_type\['module'\] {NOT_CALLABLE}'Gate'"),
    ({**GATE, "module": None}, FFN, {}, TypeError, rf"gate_type\['module'\] {NOT_CALLABLE}None"),
    ({**GATE, "module": no_module}, FFN, {}, TypeError, NO_MODULE),
    ({**GATE, "module": NoTopK}, FFN, {}, TypeError, r"the gate NoTopK must have an attribute `top_k`"),
    ({**GATE, "module": TopK, "top_k": 0}, FFN, {}, ValueError, r"TopK\.top_k must be at least 1, got 0"),
    ({**GATE, "module": TopK, "top_k": 1.5}, FFN, {}, TypeError, r"TopK\.top_k must be an integer, got 1\.5"),
    ({**GATE, "capacity_factor": "x"}, FFN, {}, TypeError, r"gate_type\['capacity_factor'\] must be a number, got 'x'"),
    ({**GATE, "gate_noise": -1.0}, FFN, {}, ValueError, r"gate_type\['gate_noise'\] must be at least 0\.0, got -1\.0"),
    # Gate megatron.
    (MEGATRON, FFN, {}, ValueError, r"'megatron' needs one expert a device, got 4 shared by 1"),
    (MEGATRON, {**LLAMA, "count_per_node": 1}, {}, ValueError, r"'megatron' needs experts of type 'ffn'"),
    (MEGATRON, MODULE, {}, ValueError, r"'megatron' needs experts of type 'ffn'"),
    ([TOP, MEGATRON], ONE, {}, ValueError, r"'megatron' must be the only one"),
    # Experts ffn.
    (TOP, {**FFN, "implicit_dropout_p": 1}, {}, ValueError, r"experts\['implicit_dropout_p'\] must be below 1, got 1"),
    (TOP, {**FFN, "implicit_dropout_p": None}, {}, TypeError, r"implicit_dropout_p'\] must be a number, got None"),
    (TOP, {**FFN, "fc1_copies": 0}, {}, ValueError, r"experts\['fc1_copies'\] must be at least 1, got 0"),
    (TOP, {**FFN, "output_dim": 2.5}, {}, TypeError, r"experts\['output_dim'\] must be an integer, got 2\.5"),
    (TOP, {**FFN, "has_fc2_bias": "no"}, {}, TypeError, r"experts\['has_fc2_bias'\] must be True or False, got 'no'"),
    (TOP, {**FFN, "activation_fn_with_self": 1}, {}, TypeError, rf"activation_fn_with_self'\] {NOT_CALLABLE}1"),
    (TOP, {**FFN, "fused_custom_fn": "f"}, {}, TypeError, rf"experts\['fused_custom_fn'\] {NOT_CALLABLE}'f'"),
    (TOP, {**FFN, "activation_fn": torch.tanh, "activation_fn_with_self": torch.tanh}, {}, ValueError,
     r"only one of 'activation_fn' or 'activation_fn_with_self'"),
    (TOP, {**FFN, "activation_fn": torch.tanh, "fused_custom_fn": user.fused}, {}, ValueError,
     r"only one of 'activation_fn' or 'fused_custom_fn'"),
    # Experts attention and llama_ffn.
    (TOP, {"type": "attention"}, {}, ValueError, r"experts of type 'attention' must have 'attention_fn'"),
    (TOP, {**ATTENTION, "fused_custom_fn": user.fused}, {}, ValueError, r"unknown option 'fused_custom_fn'"),
    (TOP, {**ATTENTION, "attention_fn": 3}, {}, TypeError, rf"experts\['attention_fn'\] {NOT_CALLABLE}3"),
    (TOP, {"type": "llama_ffn"}, {}, ValueError, r"experts must have 'hidden_size_per_expert'"),
    (TOP, {**LLAMA, "activation_fn": "silu"}, {}, TypeError, rf"experts\['activation_fn'\] {NOT_CALLABLE}'silu'"),
    # Experts custom and modules.
    (TOP, {"type": "custom"}, {}, ValueError, r"experts of type 'custom' must have 'module', the experts' class"),
    (TOP, {**CUSTOM, "module": 3}, {}, TypeError, rf"experts\['module'\] {NOT_CALLABLE}3"),
    (TOP, {**CUSTOM, "module": no_module}, {}, TypeError, NO_MODULE),
    (TOP, {**CUSTOM, "nothing": 1}, {}, TypeError, r"unexpected keyword argument 'nothing'"),
    (TOP, [], {}, TypeError, r"must hold at least one torch\.nn\.Module, got \[\]"),
    (TOP, torch.nn.ModuleList(), {}, TypeError, r"must hold at least one torch\.nn\.Module, got \[\]"),
    (TOP, [MODULE, None], {}, TypeError, r"at least one torch\.nn\.Module, got \[Linear.*None\]"),
    (TOP, None, {}, TypeError, r"experts must be a dict with string keys, got None"),
    # Counts that contradict each other.
    ({"k": -2}, MODULE, {}, ValueError, r"several times and differs: len\(experts\)=1, gate_type\[0\]\['k'\]=-2"),
    ([{"k": -1}, {"k": -2}], ONE, {}, ValueError, r"differs: gate_type\[0\]\['k'\]=-1, gate_type\[1\]\['k'\]=-2"),
    ({"k": -3}, ONE, {}, ValueError, r"'k'\]=-3 means that 3 ranks share one expert, .* number of ranks \(1\)"),
    (TOP, {**CUSTOM, "count_per_node": -4}, {}, ValueError, r"=-4 means that 4 ranks share one expert"),
    # The layer.
    (TOP, FFN, {"is_gshard_loss": "yes"}, TypeError, r"is_gshard_loss must be True or False, got 'yes'"),
    (TOP, FFN, {"batch_prioritized_routing": 3}, TypeError, r"batch_prioritized_routing must be True or False, got 3"),
    (TOP, FFN, {"parallel_type": "adaptive"}, TypeError, r"parallel_type='adaptive:r', r must be an integer, got ''"),
    (TOP, FFN, {"parallel_type": ["data"]}, ValueError, r"parallel_type must be 'data', .*, got \['data'\]"),
]  # fmt: skip


@pytest.mark.parametrize(("gate", "experts", "options", "error", "message"), MADE, ids=range(len(MADE)))
def test_layers_that_cannot_be_made(gate, experts, options, error, message):
    given = {"gate_type": gate, "experts": experts, **options}
    before = repr(given)
    with pytest.raises(error, match=message):
        moe.moe_layer(model_dim=6, **given)
    assert repr(given) == before


# What a gate returns, exception, message. Its tokens are [5, 6], and there are 4 experts.
LOGITS = [
    (lambda x: x[:, :3], ValueError, r"the gate Returns must return logits \[T, E\] = \[5, 4\], got shape \[5, 3\]"),
    (lambda x: x[:2, :4], ValueError, r"\[T, E\] = \[5, 4\], got shape \[2, 4\]"),
    (lambda x: x[:, :4].unsqueeze(0), ValueError, r"\[T, E\] = \[5, 4\], got shape \[1, 5, 4\]"),
    (lambda x: x[:, :4].int(), TypeError, r"the gate Returns must return a floating-point .*Tensor, got torch\.int32"),
    (lambda x: None, TypeError, r"must return a floating-point torch\.Tensor, got NoneType"),
    (lambda x: (x[:, :4], None), TypeError, r"must return a floating-point torch\.Tensor, got tuple"),
]


class Returns(torch.nn.Module):
    """A gate, or experts, or an expert, that returns whatever the test says."""

    def __init__(self, function, **_):
        super().__init__()
        self.function, self.top_k = function, 1

    def forward(self, x, ctx=None):
        return self.function(x)


@pytest.mark.parametrize(("function", "error", "message"), LOGITS)
def test_logits(function, error, message):
    layer = moe.moe_layer({"type": "custom", "module": Returns, "function": function}, 6, FFN)
    with pytest.raises(error, match=message):
        layer(torch.zeros(5, 6))


# As above; x is [4, 2, 6].
PADDED = [
    (lambda x: x[:, :1], r"experts Returns must return shape \[4, 2, D_out\], got \[4, 1, 6\]"),
    (lambda x: x[:3], r"must return shape \[4, 2, D_out\], got \[3, 2, 6\]"),
    (lambda x: x.reshape(8, 6), r"must return shape \[4, 2, D_out\], got \[8, 6\]"),
    (lambda x: [x], r"must return shape \[4, 2, D_out\], got list"),
    (lambda x: None, r"must return shape \[4, 2, D_out\], got NoneType"),
]


@pytest.mark.parametrize(("function", "message"), PADDED)
def test_outputs_of_custom_experts(function, message):
    experts = {"type": "custom", "module": Returns, "count_per_node": 4, "function": function}
    with pytest.raises(ValueError, match=message):
        moe.moe_layer(TOP, 6, experts)(torch.zeros(8, 6))


@pytest.mark.parametrize("function", [lambda x: x[:, :1], lambda x: x[0], lambda x: None])
def test_outputs_of_fused_custom_fn(function):
    layer = moe.moe_layer(TOP, 6, {**FFN, "fused_custom_fn": lambda experts, x: function(x)})
    with pytest.raises(ValueError, match=r"fused_custom_fn|must return shape \[4, 2, D_out\], got"):
        layer(torch.zeros(8, 6))


MODULES = [
    (lambda x: x[:1], r"experts\[0\] must return shape \[2, D_out\], got \[1, 6\]"),
    (lambda x: x.unsqueeze(0), r"experts\[0\] must return shape \[2, D_out\], got \[1, 2, 6\]"),
    (lambda x: None, r"experts\[0\] must return shape \[2, D_out\], got NoneType"),
]


@pytest.mark.parametrize(("function", "message"), MODULES)
def test_outputs_of_modules(function, message):
    layer = moe.moe_layer(TOP, 6, [Returns(function), MODULE, MODULE, MODULE])
    with pytest.raises(ValueError, match=message):
        layer(torch.zeros(8, 6))


def test_outputs_of_modules_must_agree():
    layer = moe.moe_layer({"k": 2}, 6, [MODULE, torch.nn.Linear(6, 3)])
    with pytest.raises(ValueError, match=r"experts\[1\] must return shape \[8, 6\], got \[8, 3\]"):
        layer(torch.zeros(8, 6))


def state_with(**changes):
    return {**make_layer().state_dict(), **changes}


STATES = [
    (lambda: make_layer(num_experts=3).state_dict(), RuntimeError, r"for 3 experts, but the layer has 4"),
    (lambda: make_layer(hidden_size=7).state_dict(), RuntimeError, r"fc1_w.*\[4, 7, 6\].*\[4, 5, 6\]"),
    (lambda: state_with(**{"gates.0.wg.weight": torch.zeros(4, 7)}), RuntimeError, r"wg.*\[4, 7\].*\[4, 6\]"),
    (lambda: state_with(more=torch.zeros(1)), RuntimeError, r"Unexpected key.*more"),
    (lambda: make_layer(experts={"output_dim": 3}).state_dict(), RuntimeError, r"fc2_w.*\[4, 5, 3\].*\[4, 5, 6\]"),
]


@pytest.mark.parametrize(("state", "error", "message"), STATES)
def test_states(state, error, message):
    with pytest.raises(error, match=message):
        make_layer().load_state_dict(state())


LAYOUT = r"layout must be 'v0\.1\.4' or 'v0\.1\.5', got "
NOT_FFN = r"older layouts exist for experts of type 'ffn' only, got ModuleExperts"
OTHERS = [
    (lambda: checkpoint.load_legacy_state_dict(make_layer(), {}, layout="v0.2"), ValueError, LAYOUT + r"'v0\.2'"),
    (lambda: checkpoint.legacy_state_dict(make_layer(), layout=None), ValueError, LAYOUT + "None"),
    (lambda: checkpoint.legacy_state_dict(moe.moe_layer(TOP, 6, MODULE), layout="v0.1.4"), TypeError, NOT_FFN),
    (lambda: make_layer().get_parameter_iterator("experts"), ValueError, r"'gate' or 'local_experts', got 'experts'"),
    (lambda: moe.moe_layer.global_expert_count(0), ValueError, r"must not be 0"),
    (lambda: gshard_loss(torch.zeros(3, 4), torch.zeros(2, 1).long()), ValueError, r"top_ids must .*\[3, any\]"),
    (lambda: gshard_loss(torch.zeros(3, 4).long(), torch.zeros(3, 1).long()), TypeError, r"scores_w_noise must be"),
    (lambda: load_importance_loss(torch.zeros(3, 4), torch.zeros(3, 1), 4, 0.0), ValueError, r"gate_noise > 0, got 0"),
    (lambda: load_importance_loss(torch.zeros(3, 4), torch.zeros(3, 1), 5, 1.0), ValueError, r"shape \[any, 5\]"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), OTHERS)
def test_functions(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("attribute", ["top_k", "capacity_factor", "gate_noise"])
def test_attributes_of_gates(attribute):
    layer = make_layer()
    setattr(layer.gates[0], attribute, "many")
    with pytest.raises(TypeError, match=rf"{attribute} must be (an integer|a number), got 'many'"):
        layer(torch.zeros(5, 6))


@pytest.mark.parametrize("gate", [TOP, COSINE, {**GATE, "top_k": 2}, [TOP, COSINE]])
@pytest.mark.parametrize("experts", [FFN, LLAMA, CUSTOM, {**ATTENTION, "count_per_node": 4}, [MODULE, MODULE]])
def test_options_of_the_caller_stay_as_they_were(gate, experts):
    before = copy.deepcopy(gate), copy.copy(experts)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer = moe.moe_layer(gate, 6, experts, seeds=(1, 2, 3))
        layer(torch.zeros(5, 6))
    assert (gate, experts) == before
