"""Tensors that are not contiguous give the bits of their contiguous copies, forward and backward."""

import pytest
import torch
from reference import DTYPES, assert_same_bits, exact_gates, exact_tokens, exact_values, make_layer, random_values
from tutel.functional import assign_rows, combine, dispatch, grouped_gemm, select_experts

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
PLAN = assign_rows(torch.tensor([[0, 2], [1, 0], [2, 1], [0, 1]], dtype=torch.int32), 3, capacity=2)


def transposed(tensor):
    return tensor.transpose(0, -1).contiguous().transpose(0, -1)


def strided(tensor):
    return torch.stack([tensor, tensor + 1], dim=-1)[..., 0]


def offset(tensor):
    return torch.cat([tensor.flatten()[:1], tensor.flatten()])[1:].view(tensor.shape)


def expanded(tensor):
    return tensor[:1].expand_as(tensor)


LAYOUTS = pytest.mark.parametrize("layout", [transposed, strided, offset, expanded])
CASES = {
    "select_experts": (lambda logits: select_experts(logits, 2).weights, [(4, 6)]),
    "dispatch": (lambda tokens, weights: dispatch(tokens, PLAN.row_index, PLAN.row_choice, weights), [(4, 6), (4, 2)]),
    "combine": (lambda rows, weights: combine(rows, PLAN.row_index, PLAN.row_choice, weights), [(8, 6), (4, 2)]),
    "grouped_gemm": (lambda rows, w, b: grouped_gemm(rows, w, PLAN.offsets, b), [(8, 6), (3, 6, 5), (3, 5)]),
    "grouped_gemm_transposed": (
        lambda rows, w, b: grouped_gemm(rows, w, PLAN.offsets, b, transposed=True),
        [(8, 6), (3, 5, 6), (3, 5)],
    ),
}


@dtypes
@LAYOUTS
@pytest.mark.parametrize("case", CASES)
def test_operators(dtype, layout, case):
    function, shapes = CASES[case]
    is_weight = {1} if case in ("dispatch", "combine") else set()
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    arguments = [
        layout(random_values(shape, acc if index in is_weight else dtype, seed=index)).requires_grad_()
        for index, shape in enumerate(shapes)
    ]
    plain = [argument.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for argument in arguments]
    outputs = [function(*values) for values in (arguments, plain)]
    upstream = random_values(outputs[0].shape, outputs[0].dtype, seed=9)
    grads = [
        torch.autograd.grad(output, values, layout(upstream) if values is arguments else layout(upstream).contiguous())
        for output, values in zip(outputs, (arguments, plain), strict=True)
    ]
    assert_same_bits("output", *outputs)
    for found, expected in zip(*grads, strict=True):
        assert_same_bits("gradient", found, expected)


def test_integers_may_have_any_layout_too():
    ids = torch.tensor([[0, 2], [1, 0], [2, 1], [0, 1]], dtype=torch.int32)
    priority = torch.tensor([0.1, 0.4, 0.2, 0.3])
    plan = assign_rows(transposed(ids), 3, capacity=2, priority=strided(priority))
    assert all(map(torch.equal, plan, assign_rows(ids, 3, capacity=2, priority=priority)))
    tokens = exact_values((4, 3))
    rows = dispatch(tokens, transposed(plan.row_index), strided(plan.row_choice))
    assert_same_bits("rows", rows, dispatch(tokens, plan.row_index, plan.row_choice))
    back = combine(rows, transposed(plan.row_index), strided(plan.row_choice))
    assert_same_bits("tokens", back, combine(rows, plan.row_index, plan.row_choice))
    weight = exact_values((3, 3, 2))
    assert_same_bits(
        "product", grouped_gemm(rows, weight, strided(plan.offsets)), grouped_gemm(rows, weight, plan.offsets)
    )


@dtypes
@LAYOUTS
def test_layer(dtype, layout):
    layer = exact_gates(make_layer(dtype=dtype))
    tokens = layout(exact_tokens(10, 6, dtype)).requires_grad_()
    plain = tokens.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
    outputs = [layer(tokens), layer(plain)]
    assert_same_bits("output", *outputs)
    # A sum's gradient is an expanded scalar.
    grads = [
        torch.autograd.grad(output.sum() + output.l_aux, [leaf, *layer.parameters()])
        for output, leaf in zip(outputs, [tokens, plain], strict=True)
    ]
    for found, expected in zip(*grads, strict=True):
        # Not the same bits: the gate's gradients are torch's own products, whose bits depend on the layout.
        torch.testing.assert_close(found, expected)


def test_expert_parameters_of_any_layout():
    layer = make_layer(dtype=torch.float64)
    tokens = random_values((10, 6))
    expected = layer(tokens)
    for name, parameter in list(layer.experts.named_parameters()):
        setattr(layer.experts, name, torch.nn.Parameter(strided(parameter.data)))
    assert_same_bits("output", layer(tokens), expected)
