"""Nonsense straight to the raw operators: a RuntimeError that names operator and argument; the process lives on.

Whoever calls ``torch.ops.tutel`` passes by the checks of ``tutel.functional``, and C++ code can.
"""

import pytest
import torch

from tutel import functional  # noqa: F401  (registers the operators)

ops = torch.ops.tutel
f = torch.zeros
ROWS, LOGITS, WEIGHT = f(3, 4), f(3, 4), f(2, 4, 5)


def i32(*shape):
    return torch.zeros(shape, dtype=torch.int32)


def i64(*shape):
    return torch.zeros(shape, dtype=torch.int64)


IDS, INDEX, OFFSETS = i32(3, 1), i64(2, 2), i64(3)
HUGE = torch.zeros(1, 1).expand(2**31, 2**31)


def emptied():
    tensor = f(3, 4)
    tensor.untyped_storage().resize_(0)
    return tensor


def weight_grad(left, right, offsets, left_choice=None, right_choice=None, top_k=1):
    return ops.grouped_gemm_weight_grad(left, right, offsets, left_choice, right_choice, top_k)


def hidden(rows, weight, *, choice=None, bias=None, value=None, activation=0):
    return ops.expert_hidden(rows, choice, 1, weight, bias, value, OFFSETS, False, activation, True)


def hidden_grad(grad, weight, *, choice=None, value=None):
    return ops.expert_hidden_grad(grad, choice, None, weight, False, OFFSETS, 0, f(3, 6), value, True)


BAD = [
    (lambda: ops.select_experts(f(3), 1, True, True), "select_experts: logits must have 2 dimensions, got shape [3]"),
    (lambda: ops.select_experts(LOGITS, 0, True, True), "top_k must be between 1 and the number of experts (4), got 0"),
    (lambda: ops.select_experts(LOGITS, 5, True, True), "top_k must be between 1 and the number of experts (4), got 5"),
    (lambda: ops.select_experts(LOGITS, -1, True, True), "top_k must not be negative, got -1"),
    (lambda: ops.select_experts(f(3, 0), 1, True, True), "number of experts (0), got 1"),
    (lambda: ops.select_experts(f(4, 3).T, 1, True, True), "logits: expected a contiguous tensor, found sizes [3, 4]"),
    (lambda: ops.select_experts(IDS, 1, True, True), "bfloat16 or float16, got int32"),
    (lambda: ops.select_experts(IDS.bool(), 1, True, True), "bfloat16 or float16, got bool"),
    (lambda: ops.select_experts(LOGITS.to(torch.complex64), 1, True, True), "bfloat16 or float16, got complex64"),
    (lambda: ops.select_experts(LOGITS.to(torch.float8_e4m3fn), 1, True, True), "float16, got float8_e4m3fn"),
    (lambda: ops.select_experts(HUGE, 1, True, True), "at most 2147483647 experts are supported, got 2147483648"),
    (lambda: ops.select_experts(None, 1, True, True), "tutel::select_experts"),
    (lambda: ops.select_experts(LOGITS.to_sparse(), 1, True, True), "tutel::select_experts"),
    (lambda: ops.select_experts_backward(LOGITS, IDS + 4, f(3, 1), None, True, True), "topk_ids[0] is 4, allowed are"),
    (lambda: ops.select_experts_backward(LOGITS, IDS - 1, f(3, 1), None, True, True), "topk_ids[0] is -1"),
    (lambda: ops.select_experts_backward(LOGITS, IDS[:2], None, None, True, True), "must agree, got 3 and 2"),
    (
        lambda: ops.select_experts_backward(LOGITS, IDS, f(2, 1), None, True, True),
        "grad_weights must have shape [3, 1], got [2, 1]",
    ),
    (lambda: ops.select_experts_backward(LOGITS, IDS, f(3, 1).double(), None, True, True), "of float32"),
    (
        lambda: ops.select_experts_backward(LOGITS, IDS, None, f(3), True, True),
        "grad_score_sums must have shape [4], got [3]",
    ),
    (lambda: ops.select_experts_backward(LOGITS, i64(3, 1), None, None, True, True), "tensor of int32, found int64"),
    (lambda: ops.assign_rows(IDS, None, -1, -1), "assign_rows: num_experts must not be negative, got -1"),
    (lambda: ops.assign_rows(IDS, None, 2**62, -1), "2147483647 experts are supported, got 4611686018427387904"),
    (lambda: ops.assign_rows(IDS, None, 2, -2), "capacity (-1 means unlimited) must not be negative, got -2"),
    (lambda: ops.assign_rows(IDS + 2, None, 2, -1), "topk_ids[0] is 2, allowed are -1 (none) and 0 up to"),
    (lambda: ops.assign_rows(i64(3, 1), None, 2, -1), "topk_ids: expected a tensor of int32, found int64"),
    (lambda: ops.assign_rows(IDS, f(2), 2, -1), "priority must have shape [3], got [2]"),
    (lambda: ops.assign_rows(IDS, f(3).half(), 2, -1), "priority must be float32 or float64"),
    (lambda: ops.padded_rows(IDS, IDS[:2], 2, 3), "padded_rows"),
    (lambda: ops.padded_rows(IDS, IDS, 2, -3), "capacity"),
    (lambda: ops.padded_rows(IDS + 2, IDS, 2, 3), "topk_ids[0] is 2"),
    (lambda: ops.padded_rows(IDS[:1], IDS[:1], 2**31 - 1, 2**62), "2147483647"),
    (lambda: ops.prefix_count(i32(3), 0), "mask must have 2 dimensions"),
    (lambda: ops.prefix_count(IDS, 2), "dim"),
    (lambda: ops.prefix_count(ROWS, 0), "float32"),
    (lambda: ops.dispatch(ROWS, i64(3) + 6, None, 2), "row_choice[0] is 6, allowed are -1 (none) and 0 up to"),
    (lambda: ops.dispatch(ROWS, i64(3) - 2, None, 2), "row_choice[0] is -2"),
    (lambda: ops.dispatch(ROWS, i64(3), None, 0), "row_choice[0] is 0, allowed are -1"),
    (lambda: ops.dispatch(ROWS, i64(3), None, -3), "top_k must not be negative, got -3"),
    (lambda: ops.dispatch(ROWS, i64(3), None, 2**62), "choices is too large: [3, 4611686018427387904]"),
    (lambda: ops.dispatch(ROWS.half(), i64(3), f(3, 2).half(), 2), "a tensor of float32, found float16"),
    (lambda: ops.dispatch(ROWS, i64(3), f(3, 3), 2), "weights must have shape [3, 2], got [3, 3]"),
    (lambda: ops.dispatch(f(4, 3).T, i64(3), None, 2), "tokens: expected a contiguous tensor"),
    (lambda: ops.dispatch(ROWS, None, None, 2), "row_choice"),
    (lambda: ops.combine(ROWS, INDEX + 3, None), "row_index[0] is 3, allowed are -1"),
    (lambda: ops.combine(ROWS, i64(2), None), "row_index must have 2 dimensions, got shape [2]"),
    (lambda: ops.combine(f(3, 4, 1), INDEX, None), "rows must have 2 dimensions, got shape [3, 4, 1]"),
    (lambda: ops.combine(ROWS, INDEX.int(), None), "row_index: expected a tensor of int64, found int32"),
    (lambda: ops.combine(ROWS, None, None), "row_index"),
    (lambda: ops.combine(emptied(), INDEX, None), "needs 48 bytes, but its storage holds 0"),
    (lambda: ops.row_dot(ROWS, INDEX, f(2, 5)), "the widths of rows and tokens must agree, got 4 and 5"),
    (lambda: ops.row_dot(ROWS, INDEX, ROWS), "must agree, got 2 and 3"),
    (lambda: ops.row_dot(ROWS, INDEX, f(2, 4).double()), "tokens: expected a tensor of float32, found float64"),
    (lambda: ops.grouped_gemm(ROWS, WEIGHT, None, OFFSETS + 1, False), "offsets[0] is 1"),
    (lambda: ops.grouped_gemm(ROWS, WEIGHT, None, torch.tensor([0, 2, 4]), False), "offsets[2] is 4"),
    (lambda: ops.grouped_gemm(ROWS, WEIGHT, None, torch.tensor([0, 3, 2]), False), "offsets[2] is 2"),
    (lambda: ops.dispatch(ROWS, i64(3), f(2, 3), 2), "weights must have shape [3, 2], got [2, 3]"),
    (lambda: ops.grouped_gemm(ROWS, WEIGHT, None, i64(2), False), "offsets has 2 elements, expected 3"),
    (lambda: ops.grouped_gemm(ROWS, f(2, 5, 4), None, OFFSETS, False), "inner size of weight must agree, got 4 and 5"),
    (lambda: ops.grouped_gemm(ROWS, f(4, 5), None, OFFSETS, False), "weight must have 3 dimensions, got shape [4, 5]"),
    (lambda: ops.grouped_gemm(ROWS, WEIGHT, f(2, 4), OFFSETS, False), "bias must have shape [2, 5], got [2, 4]"),
    (lambda: ops.grouped_gemm(ROWS, WEIGHT.bfloat16(), None, OFFSETS, False), "tensor of float32, found bfloat16"),
    (lambda: ops.grouped_gemm(ROWS, f(2, 5, 4).mT, None, OFFSETS, False), "weight: expected a contiguous tensor"),
    (lambda: weight_grad(ROWS, f(4, 4), OFFSETS), "rows of left and right must agree, got 3 and 4"),
    (lambda: weight_grad(ROWS, ROWS.half(), OFFSETS), "expected a tensor of float32, found float16"),
    (lambda: weight_grad(ROWS, ROWS, i64(0)), "offsets has 0 elements, expected 1"),
    (lambda: weight_grad(ROWS, ROWS, OFFSETS, i64(3) + 6, None, 2), "row_choice[0] is 6, allowed are -1 (none) and 0"),
    (lambda: weight_grad(ROWS, ROWS, OFFSETS, None, i64(3) - 2, 2), "row_choice[0] is -2, allowed are -1 (none) and 0"),
    (lambda: weight_grad(ROWS, ROWS, OFFSETS, None, i64(3), -1), "top_k must not be negative, got -1"),
    (lambda: ops.grouped_gemm_pair(ROWS, WEIGHT, f(4, 4), WEIGHT, OFFSETS, False), "other_rows must have shape [3, 4]"),
    (lambda: ops.grouped_gemm_pair(ROWS, WEIGHT, ROWS, f(2, 5, 4), OFFSETS, False), "other_weight must have shape"),
    (lambda: hidden(ROWS, WEIGHT, activation=99), "activation must be between 0 and 6, got 99"),
    (lambda: hidden(ROWS, f(2, 5, 4)), "inner size of weight must agree, got 4 and 5"),
    (lambda: hidden(ROWS, WEIGHT, bias=f(2, 4)), "bias must have shape [2, 5], got [2, 4]"),
    (lambda: hidden(ROWS, WEIGHT, value=f(2, 5, 4)), "value_weight must have shape [2, 4, 5], got [2, 5, 4]"),
    (lambda: hidden(ROWS, WEIGHT, choice=i64(4) + 3), "row_choice[0] is 3, allowed are -1 (none) and 0 up to"),
    (lambda: hidden_grad(ROWS, f(2, 6, 5)), "width of grad and of the experts' output must agree, got 4 and 5"),
    (lambda: hidden_grad(ROWS, f(2, 5, 4)), "hidden size of weight must agree, got 6 and 5"),
    (lambda: hidden_grad(f(4, 4), f(2, 6, 4)), "numbers of rows of pre and grad must agree, got 3 and 4"),
    (lambda: hidden_grad(ROWS, f(2, 6, 4), choice=i64(3)), "row_choice and weights must be given together"),
    (lambda: hidden_grad(ROWS, f(2, 6, 4), value=f(3, 5)), "value must have shape [3, 6], got [3, 5]"),
    (lambda: ops.grouped_sum(ROWS, i64(0)), "offsets has 0 elements, expected 1"),
    (lambda: ops.grouped_sum(ROWS, i64(1, 3)), "offsets must have 1 dimensions, got shape [1, 3]"),
    (lambda: ops.grouped_sum(emptied(), OFFSETS), "needs 48 bytes, but its storage holds 0"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "message"), BAD, ids=[f"{index}: {row[1]}" for index, row in enumerate(BAD)])
def test_nonsense(call, message):
    with pytest.raises(RuntimeError) as caught:
        call()
    assert message in str(caught.value)
    assert "panic" not in str(caught.value)


def test_no_choice_at_all_is_empty():
    none = torch.zeros(2, 0, dtype=torch.int64)
    assert ops.combine(ROWS, none, None).tolist() == [[0.0] * 4] * 2


def test_gradient_of_no_choice_at_all_is_empty():
    assert ops.row_dot(ROWS, torch.zeros(2, 0, dtype=torch.int64), f(2, 4)).shape == (2, 0)


def test_wrong_kinds_of_arguments_never_reach_the_kernel():
    for arguments in [("rows", INDEX, None), (ROWS,), (ROWS, INDEX, None, 3), (ROWS, 3, None), (ROWS, INDEX, 1.0)]:
        with pytest.raises((RuntimeError, TypeError), match="tutel::combine"):
            ops.combine(*arguments)
