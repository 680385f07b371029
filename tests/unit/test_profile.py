"""What one training step calls and allocates: the operators in Rust do the work, nothing grows with T * E or E * C."""

import torch
from reference import make_layer, random_values
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

FORBIDDEN = ("sort", "cumsum", "one_hot", "index_add", "index_put", "scatter", "gather", "topk", "softmax", "bmm")
OPERATORS = [
    "select_experts",
    "select_experts_backward",
    "assign_rows",
    "dispatch",
    "combine",
    "row_dot",
    "expert_hidden",
    "expert_hidden_grad",
    "grouped_gemm",
    "grouped_gemm_weight_grad",
    "grouped_sum",
]
# C = 2 * int(4 * ceil(64 / 50)) = 16; a padded layout would have E * C * D = 6,400 elements.
NUM_TOKENS, NUM_EXPERTS, WIDTH, CAPACITY = 64, 50, 8, 16


def training_step():
    layer = make_layer(model_dim=WIDTH, num_experts=NUM_EXPERTS, hidden_size=WIDTH, top_k=2, capacity_factor=4.0)
    tokens = random_values((NUM_TOKENS, WIDTH), torch.float32).requires_grad_()

    def step():
        output = layer(tokens)
        (output.sum() + output.l_aux).backward()

    step()
    return step


def test_operators_of_a_step():
    step = training_step()
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiled:
        step()
    counts = {event.key: event.count for event in profiled.key_averages()}
    named = [name for name in counts if name.startswith("aten::")]
    assert not [name for name in named if any(word in name for word in FORBIDDEN)]
    # The gate's product, and its two gradients; the experts' products are ours.
    products = {name: count for name, count in counts.items() if name in ("aten::mm", "aten::addmm", "aten::matmul")}
    assert products.get("aten::mm", 0) <= 3
    assert products.get("aten::addmm", 0) == 0
    called = {name.removeprefix("tutel::"): count for name, count in counts.items() if name.startswith("tutel::")}
    assert sorted(called) == sorted(OPERATORS)
    # An expert's first layer and its second's gradient are the operators of hidden units.
    assert called["expert_hidden"] == called["expert_hidden_grad"] == 1
    assert called["grouped_gemm"] == 2
    assert called["grouped_gemm_weight_grad"] == 2
    # Tokens become rows only for the gradient of the second bias; rows are combined forward and backward.
    assert called["dispatch"] == 1
    assert called["combine"] == 2


class Outputs(TorchDispatchMode):
    """Every tensor that an operator returns."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, torch.Tensor):
                self.seen.append((str(func), value.dtype, value.numel()))
        return result


def test_allocations_of_a_step():
    step = training_step()
    with Outputs() as outputs:
        step()
    assert any(name.startswith("tutel.grouped_gemm_weight_grad") for name, _, _ in outputs.seen), "backward is seen"
    assert not [seen for seen in outputs.seen if seen[2] >= NUM_EXPERTS * CAPACITY * WIDTH]
    integers = [seen for seen in outputs.seen if not seen[1].is_floating_point]
    assert integers
    assert not [seen for seen in integers if seen[2] >= NUM_TOKENS * NUM_EXPERTS]
