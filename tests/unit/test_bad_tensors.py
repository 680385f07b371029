"""Tensors and numbers that do not fit, given to the layer and to the functions: an error that says what is allowed."""

import pytest
import torch
from reference import make_layer
from tutel.functional import assign_rows, combine, dispatch, grouped_gemm, select_experts
from tutel.route import RoutePlan, drop_threshold

TOKENS = torch.zeros(4, 6)
FLOATS = r"must be torch.float64, torch.float32, torch.bfloat16 or torch.float16, got torch\."


def meta(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype, device="meta")


FORWARD = [
    ((torch.zeros(6),), {}, ValueError, r"input must have at least 2 dimensions, got shape \[6\]"),
    ((torch.tensor(1.0),), {}, ValueError, r"at least 2 dimensions, got shape \[\]"),
    ((torch.zeros(4, 7),), {}, ValueError, r"input's last dimension must hold model_dim=6 values, got shape \[4, 7\]"),
    ((torch.zeros(4, 0),), {}, ValueError, r"must hold model_dim=6 values, got shape \[4, 0\]"),
    ((torch.zeros(4, 2, 2),), {"reserve_dims": 2}, ValueError, r"last 2 dimensions must hold model_dim=6 values"),
    ((torch.zeros(4, 6),), {"reserve_dims": 2}, ValueError, r"at least 3 dimensions, got shape \[4, 6\]"),
    ((TOKENS,), {"reserve_dims": 0}, ValueError, r"reserve_dims must be at least 1, got 0"),
    ((TOKENS.long(),), {}, TypeError, rf"input {FLOATS}int64"),
    ((TOKENS.bool(),), {}, TypeError, rf"input {FLOATS}bool"),
    ((TOKENS.to(torch.complex64),), {}, TypeError, rf"input {FLOATS}complex64"),
    ((TOKENS.to(torch.float8_e4m3fn),), {}, TypeError, rf"input {FLOATS}float8_e4m3fn"),
    ((TOKENS.to(torch.float8_e5m2),), {}, TypeError, rf"input {FLOATS}float8_e5m2"),
    ((meta(4, 6),), {}, ValueError, r"input and the layer's .* must be on one device, got meta and cpu"),
    (([[0.0] * 6],), {}, TypeError, r"input must be a torch\.Tensor, got list"),
    ((None,), {}, TypeError, r"input must be a torch\.Tensor, got NoneType"),
    ((TOKENS,), {"gate_index": 2}, ValueError, r"gate_index must be below the number of gates \(2\), got 2"),
    ((TOKENS,), {"gate_index": -1}, ValueError, r"gate_index must be at least 0, got -1"),
    ((TOKENS,), {"gate_index": "a"}, TypeError, r"gate_index must be an integer, got 'a'"),
    ((TOKENS,), {"top_k": 0}, ValueError, r"top_k must be at least 1, got 0"),
    ((TOKENS,), {"top_k": 1.5}, TypeError, r"top_k must be an integer, got 1\.5"),
    ((TOKENS,), {"capacity_factor": float("nan")}, ValueError, r"capacity_factor must be finite, got nan"),
    ((TOKENS,), {"capacity_factor": float("-inf")}, ValueError, r"capacity_factor must be finite, got -inf"),
    ((TOKENS,), {"capacity_factor": "2"}, TypeError, r"capacity_factor must be a number, got '2'"),
    (
        (TOKENS,),
        {"capacity_factor": 1e300},
        ValueError,
        r"capacity_factor=1e\+300 gives more slots per expert than 64 bits",
    ),
    ((TOKENS,), {"capacity_factor": -1e300}, ValueError, r"capacity_factor=-1e\+300 gives more slots"),
    ((TOKENS,), {"adaptive_r": 5}, ValueError, r"adaptive_r must be one of \[0, 1\], got 5"),
    ((TOKENS,), {"adaptive_r": "x"}, ValueError, r"adaptive_r must be one of \[0, 1\], got 'x'"),
    ((TOKENS,), {"a2a_ffn_overlap_degree": 0}, ValueError, r"a2a_ffn_overlap_degree must be at least 1, got 0"),
    ((TOKENS,), {"megablocks_size": -1}, ValueError, r"megablocks_size must be at least 0, got -1"),
    ((TOKENS,), {"capacity": 1}, TypeError, r"unexpected keyword argument 'capacity'"),
]


@pytest.mark.parametrize(("arguments", "options", "error", "message"), FORWARD, ids=[row[3] for row in FORWARD])
def test_forward(arguments, options, error, message):
    layer = make_layer(gate=None, capacity_factor=1.0)
    layer = type(layer)([{"k": 2}, {"k": 1}], 6, {"count_per_node": 4, "hidden_size_per_expert": 5})
    with pytest.raises(error, match=message):
        layer(*arguments, **options)
    assert layer(TOKENS).shape == TOKENS.shape, "the layer is as good as before"


@pytest.mark.parametrize(
    ("activation", "message"),
    [
        (lambda hidden: hidden[:, :2], r"activation_fn must .*\[8, 5\].*got \[8, 2\]"),
        (lambda hidden: None, r"activation_fn must .*got NoneType"),
        (lambda hidden: hidden.sum(), r"activation_fn must .*got \[\]"),
    ],
)
def test_activations_that_change_the_shape(activation, message):
    layer = make_layer(experts={"activation_fn": activation}, capacity_factor=0.0)
    with pytest.raises(ValueError, match=message):
        layer(TOKENS)


def test_errors_of_the_callers_functions_pass_unchanged():
    def broken(*_):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        make_layer(experts={"activation_fn": broken})(TOKENS)
    with pytest.raises(KeyError, match="mine"):
        make_layer(result_func=broken)(TOKENS)
    with pytest.raises(KeyError, match="mine"):
        make_layer(scan_expert_func=broken)


INDEX, CHOICE = torch.tensor([[0], [1], [-1], [2]]), torch.tensor([0, 1, 3, -1])
OFFSETS, WEIGHT = torch.tensor([0, 1, 3]), torch.zeros(2, 6, 3)

FUNCTIONS = [
    (lambda: select_experts(torch.zeros(4), 1), ValueError, r"logits must have shape \[any, any\], got \[4\]"),
    (lambda: select_experts(TOKENS, 0), ValueError, r"top_k must be at least 1, got 0"),
    (lambda: select_experts(TOKENS, 7), ValueError, r"top_k must be at most the number of experts \(6\), got 7"),
    (lambda: select_experts(TOKENS, 1.5), TypeError, r"top_k must be an integer, got 1\.5"),
    (lambda: select_experts(TOKENS.int(), 1), TypeError, rf"logits {FLOATS}int32"),
    (lambda: assign_rows(INDEX, 3), TypeError, r"topk_ids must be torch\.int32, got torch\.int64"),
    (lambda: assign_rows(INDEX.int(), 2), RuntimeError, r"topk_ids\[3\] is 2, allowed are -1 \(none\) and 0 up to"),
    (lambda: assign_rows(INDEX.int() - 1, 3), RuntimeError, r"topk_ids\[2\] is -2, allowed are -1"),
    (lambda: assign_rows(INDEX.int(), 0), ValueError, r"num_experts must be at least 1, got 0"),
    (lambda: assign_rows(INDEX.int(), 3, capacity=-1), ValueError, r"capacity must be at least 0, got -1"),
    (lambda: assign_rows(INDEX.int(), 3, capacity=1.5), TypeError, r"capacity must be an integer, got 1\.5"),
    (lambda: assign_rows(INDEX.int(), 3, priority=torch.zeros(3)), ValueError, r"priority must have shape \[4\], got"),
    (lambda: assign_rows(INDEX.int(), 3, priority=torch.zeros(4).half()), TypeError, r"priority must be .*float16"),
    (lambda: dispatch(TOKENS, INDEX[:3], CHOICE), ValueError, r"row_index must have shape \[4, any\], got \[3, 1\]"),
    (lambda: dispatch(TOKENS, INDEX.int(), CHOICE), TypeError, r"row_index must be torch\.int64, got torch\.int32"),
    (lambda: dispatch(TOKENS, INDEX, CHOICE + 3), RuntimeError, r"row_choice\[1\] is 4, allowed are -1"),
    (lambda: dispatch(TOKENS, INDEX, CHOICE, torch.zeros(4, 2)), ValueError, r"weights must have shape \[4, 1\]"),
    (lambda: dispatch(TOKENS.half(), INDEX, CHOICE, torch.zeros(4, 1).half()), TypeError, r"weights must be .*float32"),
    (lambda: dispatch(meta(4, 6), INDEX, CHOICE), ValueError, r"row_index and tokens must be on one device, got cpu"),
    (lambda: combine(TOKENS, INDEX + 2, CHOICE), RuntimeError, r"row_index\[3\] is 4, allowed are -1"),
    (lambda: combine(TOKENS, INDEX, CHOICE[:3]), ValueError, r"row_choice must have shape \[4\], got \[3\]"),
    (lambda: combine(TOKENS, INDEX, CHOICE, meta(4, 1)), ValueError, r"weights and rows must be on one device"),
    (lambda: grouped_gemm(TOKENS, WEIGHT[0], OFFSETS), ValueError, r"weight must have shape \[any, 6, any\]"),
    (lambda: grouped_gemm(TOKENS, WEIGHT, OFFSETS, transposed=True), ValueError, r"weight must .*\[any, any, 6\]"),
    (lambda: grouped_gemm(TOKENS, WEIGHT.double(), OFFSETS), TypeError, r"weight must be .*float32, got .*float64"),
    (lambda: grouped_gemm(TOKENS, WEIGHT, OFFSETS[:2]), ValueError, r"offsets must have shape \[3\], got \[2\]"),
    (lambda: grouped_gemm(TOKENS, WEIGHT, OFFSETS.int()), TypeError, r"offsets must be torch\.int64"),
    (lambda: grouped_gemm(TOKENS, WEIGHT, OFFSETS + 1), RuntimeError, r"offsets must start at 0, .*offsets\[0\] is 1"),
    (lambda: grouped_gemm(TOKENS, WEIGHT, 2 * OFFSETS), RuntimeError, r"at most at the 4 rows; offsets\[2\] is 6"),
    (lambda: grouped_gemm(TOKENS, WEIGHT, -OFFSETS), RuntimeError, r"offsets\[1\] is -1"),
    (lambda: grouped_gemm(TOKENS, WEIGHT, OFFSETS, torch.zeros(3)), ValueError, r"bias must have shape \[2, 3\]"),
    (lambda: RoutePlan.from_topk(INDEX.float(), TOKENS[:, :1], 3), TypeError, r"topk_ids must .*int32, .*float32"),
    (lambda: RoutePlan.from_topk(INDEX, TOKENS, 3), ValueError, r"topk_weights must have shape \[4, 1\], got \[4, 6\]"),
    # An id that would be within range once cut to 32 bits.
    (lambda: RoutePlan.from_topk(INDEX + 2**32, TOKENS[:, :1], 3), RuntimeError, r"topk_ids\[0\] is 2147483647"),
    (lambda: drop_threshold(1e19, 10, 1, 1), ValueError, r"more slots per expert than 64 bits can count"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), FUNCTIONS, ids=[row[2] for row in FUNCTIONS])
def test_functions(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_overrides_hold_for_one_call_only():
    layer = make_layer(num_experts=4, top_k=2, capacity_factor=0.0)
    tokens = torch.randn(12, 6)
    expected = layer(tokens)
    changed = layer(tokens, top_k=1, capacity_factor=0.25)
    assert int(layer.dispatch_count.sum()) == 12
    assert not torch.equal(changed, expected)
    assert torch.equal(layer(tokens), expected)
    assert int(layer.dispatch_count.sum()) == 24
    assert (layer.gates[0].top_k, layer.gates[0].capacity_factor) == (2, 0.0)
    layer(tokens, top_k=99)
    assert int(layer.dispatch_count.sum()) == 48, "top_k is limited to the number of experts"


def test_one_call_options_of_the_exchange_do_not_stick():
    layer = make_layer()
    tokens = torch.randn(12, 6)
    layer(tokens, a2a_ffn_overlap_degree=3, adaptive_r=0)
    assert (layer.a2a_ffn_overlap_degree, layer.adaptive_degree) == (3, 0), "of the last forward"
    layer(tokens)
    assert (layer.a2a_ffn_overlap_degree, layer.adaptive_degree) == (1, 1)
