"""Every gate x experts x score_at x sign of the capacity factor x dtype, and the sample that runs by default."""

import random
from typing import NamedTuple

import torch
from matrix import twin, user
from reference import DTYPES, random_values

from tutel import moe

MODEL_DIM, HIDDEN, EXPERTS, TOKENS, TOP_K = 6, 5, 4, 13, 2

GATES = {
    "top": {"type": "top", "k": TOP_K},
    "cosine_top": {"type": "cosine_top", "k": TOP_K, "proj_dim": 5},
    "custom": {"type": "custom", "module": user.Gate, "top_k": TOP_K},
    "megatron": {"type": "megatron"},
}

_FFN = {"type": "ffn", "hidden_size_per_expert": HIDDEN}
FFN_KINDS = {
    "ffn": _FFN | {"activation_fn": torch.nn.functional.gelu},
    "relu": _FFN,
    "fc1_copies": _FFN | {"fc1_copies": 2, "activation_fn": user.gated},
    "no_bias": _FFN | {"has_fc1_bias": False, "has_fc2_bias": False, "activation_fn": torch.tanh},
    "output_dim": _FFN | {"output_dim": 3, "activation_fn": torch.tanh},
    "with_self": _FFN | {"activation_fn_with_self": user.scaled_by_bias},
    "fused": _FFN | {"fused_custom_fn": user.fused},
    "attention": {"type": "attention", "attention_fn": user.linear_attention, "has_fc1_bias": False},
}
KINDS = {
    **FFN_KINDS,
    "llama_ffn": {"type": "llama_ffn", "hidden_size_per_expert": HIDDEN},
    "custom": {"type": "custom", "module": user.Experts, "hidden_size": HIDDEN},
    "module_list": torch.nn.ModuleList,
    "module": torch.nn.Module,
}
CAPACITY_FACTORS = {"positive": 0.5, "dropless": 0.0, "negative": -0.5}
#: Logits of a token differ by at least this much, so that no rounding changes a choice.
MARGINS = {torch.float64: 1e-4, torch.float32: 1e-3, torch.bfloat16: 0.06, torch.float16: 0.02}


class Case(NamedTuple):
    gate: str
    experts: str
    score_at: str
    capacity: str
    dtype: torch.dtype

    def __str__(self):
        return "-".join([*self[:4], str(self.dtype).removeprefix("torch.")])


def all_cases(dtypes=DTYPES):
    for gate in GATES:
        for experts in FFN_KINDS if gate == "megatron" else KINDS:
            for score_at in ("combine", "dispatch") if gate != "megatron" else ("combine",):
                for capacity in CAPACITY_FACTORS if gate != "megatron" else ("dropless",):
                    for dtype in dtypes:
                        yield Case(gate, experts, score_at, capacity, dtype)


def sample(cases, more):
    """One case of each pair of gate and experts, and some more; the same ones in each run."""
    cases, chooser = list(cases), random.Random(4)
    pairs = {}
    for case in cases:
        pairs.setdefault(case[:2], []).append(case)
    chosen = [chooser.choice(pair) for pair in pairs.values()]
    return chosen + chooser.sample([case for case in cases if case not in chosen], more)


def experts_of(kind, count=EXPERTS):
    """What the layer takes as ``experts``."""
    if kind == "module":
        return user.Expert(MODEL_DIM, HIDDEN)
    if kind == "module_list":
        return torch.nn.ModuleList(user.Expert(MODEL_DIM, HIDDEN) for _ in range(count))
    return KINDS[kind] | {"num_experts_per_device": count}


def make_layer(gate, experts, score_at="combine", capacity="dropless", dtype=torch.float32, **options):
    """A layer with those options; its weights are large enough for clear choices."""
    gate_type = dict(GATES[gate])
    if gate != "megatron":
        gate_type["capacity_factor"] = CAPACITY_FACTORS[capacity]
    torch.manual_seed(7)
    layer = moe.moe_layer(
        gate_type=gate_type,
        model_dim=MODEL_DIM,
        experts=experts_of(experts, 1 if gate == "megatron" else EXPERTS),
        is_postscore=score_at == "combine",
        **options,
    )
    with torch.no_grad():
        for parameter in layer.experts.parameters():
            parameter.copy_(torch.randn_like(parameter) / 2)
        for own in layer.gates:
            weight = own.wg.weight if gate == "top" else next(own.parameters())
            weight.copy_(torch.rand_like(weight) + 1 if gate == "cosine_top" else torch.randn_like(weight))
    return layer.to(dtype)


def clear_tokens(layer, count=TOKENS, dtype=torch.float32):
    """Random tokens whose K + 1 largest logits differ clearly."""
    pool = random_values((2000, MODEL_DIM), dtype, seed=3)
    if not layer.gates or layer.num_global_experts == 1:
        return pool[:count]
    gate = layer.gates[0]
    before = next(gate.parameters()).dtype
    with torch.no_grad():
        logits = twin.logits(gate.double(), pool.double())
    gate.to(before)
    ordered = logits.sort(dim=1, descending=True).values[:, : gate.top_k + 1]
    tokens = pool[(ordered[:, :-1] - ordered[:, 1:]).amin(dim=1) > MARGINS[dtype]][:count]
    assert len(tokens) == count, "too few tokens have clear choices"
    return tokens
