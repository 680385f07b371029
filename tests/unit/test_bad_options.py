"""Options that make no sense: each is refused by name, and the caller's dicts stay as they were."""

import copy
import re

import pytest
import torch

from tutel import moe

GATE = {"type": "top", "k": 2}
EXPERTS = {"type": "ffn", "count_per_node": 4, "hidden_size_per_expert": 5}


def make(gate=None, experts=None, **options):
    return moe.moe_layer(
        **{
            "gate_type": GATE if gate is None else gate,
            "model_dim": 6,
            "experts": EXPERTS if experts is None else experts,
            **options,
        }
    )


def gate(**options):
    return {"gate": {**GATE, **options}}


def experts(**options):
    return {"experts": {**EXPERTS, **options}}


INF, NAN = float("inf"), float("nan")

BAD = [
    # The gate.
    (gate(k=0), ValueError, r"gate_type\['k'\] must not be 0"),
    (gate(k=1.5), TypeError, r"gate_type's k must be an integer, got 1\.5"),
    (gate(k="two"), TypeError, r"k must be an integer, got 'two'"),
    (gate(k=None), TypeError, r"k must be an integer, got None"),
    (gate(k=True), TypeError, r"k must be an integer, got True"),
    (gate(k=NAN), TypeError, r"k must be an integer, got nan"),
    (gate(k=INF), TypeError, r"k must be an integer, got inf"),
    (gate(k=torch.tensor([1, 2])), TypeError, r"k must be an integer, got tensor"),
    (gate(k=-2), ValueError, r"number of experts a device holds .* differs: .*count_per_node.*=4.*'k'.*=-2"),
    (gate(capacity_factor=NAN), ValueError, r"gate_type\['capacity_factor'\] must be finite, got nan"),
    (gate(capacity_factor=INF), ValueError, r"capacity_factor'\] must be finite, got inf"),
    (gate(capacity_factor="1.0"), TypeError, r"capacity_factor'\] must be a number, got '1\.0'"),
    (gate(capacity_factor=10**400), ValueError, r"capacity_factor'\] must be finite"),
    (gate(gate_noise=-1.0), ValueError, r"gate_noise'\] must be at least 0\.0, got -1\.0"),
    (gate(gate_noise=None), TypeError, r"gate_noise'\] must be a number, got None"),
    (gate(fp32_gate="yes"), TypeError, r"fp32_gate'\] must be True or False, got 'yes'"),
    (gate(batch_prioritized_routing=2), TypeError, r"batch_prioritized_routing'\] must be True or False, got 2"),
    (gate(type="bottom"), ValueError, r"gate_type\['type'\] must be 'top'.*, got 'bottom'"),
    (gate(capacity=3), ValueError, r"gate_type has unknown option 'capacity'; allowed are .*'?capacity_factor'?.*k"),
    ({"gate": "Top2"}, ValueError, r"gate_type as a string must have the form 'Top<k>Gate', got 'Top2'"),
    ({"gate": 3}, TypeError, r"gate_type must be a dict with string keys, got 3"),
    ({"gate": {1: 2}}, TypeError, r"gate_type must be a dict with string keys, got \{1: 2\}"),
    ({"gate": []}, ValueError, r"at least one gate, got an empty list"),
    ({"gate": [GATE, {"k": 0}]}, ValueError, r"gate_type\[1\]\['k'\] must not be 0"),
    ({"gate": [GATE, None]}, TypeError, r"gate_type\[1\] must be a dict with string keys, got None"),
    # The experts.
    (experts(hidden_size_per_expert=-5), ValueError, r"hidden_size_per_expert'\] must be at least 1, got -5"),
    (experts(hidden_size_per_expert=0), ValueError, r"hidden_size_per_expert'\] must be at least 1, got 0"),
    (experts(hidden_size_per_expert=2.5), TypeError, r"hidden_size_per_expert'\] must be an integer, got 2\.5"),
    ({"experts": {"count_per_node": 2}}, ValueError, r"experts must have 'hidden_size_per_expert'"),
    (experts(count_per_node=0), ValueError, r"count_per_node'\] must not be 0"),
    (experts(count_per_node=1.5), TypeError, r"count_per_node'\] must be an integer, got 1\.5"),
    (experts(count_per_node=0.3), ValueError, r"count_per_node'\] must be a whole number, or 1 / n .*, got 0\.3"),
    (experts(count_per_node="many"), TypeError, r"count_per_node'\] must be an integer, got 'many'"),
    (experts(count_per_node=-2), ValueError, r"=-2 means that 2 ranks share one expert, but .* \(1\)"),
    (experts(count_per_node=0.5), ValueError, r"=0\.5 means that 2 ranks share one expert"),
    (experts(num_experts_per_device=3), ValueError, r"given several times and differs: .*=4, .*=3"),
    (experts(activation_fn="relu"), TypeError, r"activation_fn'\] must be callable.*, got 'relu'"),
    (experts(output_dim=0), ValueError, r"output_dim'\] must be at least 1, got 0"),
    (experts(has_fc1_bias=None), TypeError, r"has_fc1_bias'\] must be True or False, got None"),
    (experts(type="mlp"), ValueError, r"experts\['type'\] must be .*'ffn'.*, got 'mlp'"),
    (experts(hidden=3), ValueError, r"experts has unknown option 'hidden'; allowed are .*hidden_size_per_expert"),
    ({"experts": [1]}, TypeError, r"experts .*must .*got \[1\]"),
    ({"experts": "ffn"}, TypeError, r"experts must be a dict with string keys, got 'ffn'"),
    # The layer.
    ({"model_dim": 0}, ValueError, r"model_dim must be at least 1, got 0"),
    ({"model_dim": -6}, ValueError, r"model_dim must be at least 1, got -6"),
    ({"model_dim": 6.5}, TypeError, r"model_dim must be an integer, got 6\.5"),
    ({"seeds": 1}, ValueError, r"seeds must be \(shared, local\) or \(shared, local, after\), got 1"),
    ({"seeds": (1,)}, ValueError, r"seeds must be .* got \(1,\)"),
    ({"seeds": (1, 2, 3, 4)}, ValueError, r"seeds must be .* got \(1, 2, 3, 4\)"),
    ({"seeds": (1, "x", 3)}, TypeError, r"seeds must be an integer, got 'x'"),
    ({"seeds": (1, 0.5, 3)}, TypeError, r"seeds must be an integer, got 0\.5"),
    ({"seeds": (2**64, 1, 1)}, ValueError, r"seeds must be .*18446744073709551616"),
    ({"result_func": 3}, TypeError, r"result_func must be callable.*, got 3"),
    ({"scan_expert_func": "scan"}, TypeError, r"scan_expert_func must be callable.*, got 'scan'"),
    ({"a2a_ffn_overlap_degree": 0}, ValueError, r"a2a_ffn_overlap_degree must be at least 1, got 0"),
    (
        {"parallel_type": "both"},
        ValueError,
        r"parallel_type must be 'data', 'model', 'auto' or 'adaptive:r', got 'both'",
    ),
    ({"parallel_type": "adaptive:x"}, TypeError, r"parallel_type='adaptive:r', r must be an integer, got 'x'"),
    ({"parallel_type": "adaptive:-1"}, ValueError, r"parallel_type='adaptive:r', r must be at least 0, got -1"),
    ({"parallel_type": None}, ValueError, r"parallel_type must be .*, got None"),
    ({"is_postscore": "no"}, TypeError, r"is_postscore must be True or False, got 'no'"),
    ({"normalize_gate": None}, TypeError, r"normalize_gate must be True or False, got None"),
    ({"use_2dh": 7}, TypeError, r"use_2dh must be True or False, got 7"),
    ({"capacity": 3}, TypeError, r"'capacity'"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD, ids=[message for _, _, message in BAD])
def test_constructor(options, error, message):
    before = copy.deepcopy(options)
    with pytest.raises(error, match=message):
        make(**options)
    assert repr(options) == repr(before)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("CAP_FACTOR", "much", "environment variable CAP_FACTOR must be a number, got 'much'"),
        ("CAP_FACTOR", "nan", "capacity_factor.* must be finite"),
        ("BATCH_PRIO", "maybe", "environment variable BATCH_PRIO must be 0 or 1, got 'maybe'"),
    ],
)
def test_environment(monkeypatch, name, text, message):
    monkeypatch.setenv(name, text)
    with pytest.raises(ValueError, match=message):
        make()


def test_options_of_the_caller_stay_as_they_were():
    given = [{**GATE, "capacity_factor": 1.25}, {"k": 1}], dict(EXPERTS)
    before = copy.deepcopy(given)
    layer = make(gate=given[0], experts=given[1], seeds=[1, 2])
    layer(torch.zeros(3, 6))
    assert given == before


@pytest.mark.parametrize("name", ["pad_samples", "fp32_gate"])
def test_options_of_older_programs_are_accepted_with_a_warning(name):
    with pytest.warns(DeprecationWarning, match=name):
        make(**{name: True})


def test_every_allowed_option_is_listed():
    with pytest.raises(ValueError, match="unknown option") as caught:
        make(experts={**EXPERTS, "nope": 1})
    assert set(EXPERTS) <= set(re.findall(r"\w+", str(caught.value)))
