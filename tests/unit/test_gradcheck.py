"""torch's own check of gradients, in fp64: every differentiable function and the whole layer."""

import pytest
import torch
from reference import make_layer, random_values
from torch.autograd import gradcheck
from tutel.functional import Routes, assign_rows, combine, dispatch, expert_ffn, grouped_gemm, select_experts

# Five choices are dropped; expert 3 has no rows.
IDS = torch.tensor([[0, 1], [0, 2], [0, 1], [2, 0], [1, -1]], dtype=torch.int32)
PLAN = assign_rows(IDS, 4, capacity=2)


def leaf(*shape, seed=0):
    return random_values(shape, seed=seed).requires_grad_()


@pytest.mark.parametrize("top_k", [1, 2, 5])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("softmax", [True, False])
def test_select_experts(top_k, normalize, softmax):
    def function(logits):
        chosen = select_experts(logits, top_k, softmax=softmax, normalize=normalize)
        return chosen.weights, chosen.score_sums

    logits = leaf(4, 5) if softmax else torch.softmax(random_values((4, 5)), dim=1).requires_grad_()
    assert gradcheck(function, logits)
    # Each of the two outputs alone: the other's gradient is absent.
    assert gradcheck(lambda logits: function(logits)[0], logits)
    assert gradcheck(lambda logits: function(logits)[1], logits)


@pytest.mark.parametrize("weighted", [True, False])
def test_dispatch(weighted):
    weights = leaf(5, 2, seed=1) if weighted else None
    assert gradcheck(lambda tokens, w: dispatch(tokens, PLAN.row_index, PLAN.row_choice, w), (leaf(5, 3), weights))


@pytest.mark.parametrize("weighted", [True, False])
def test_combine(weighted):
    weights = leaf(5, 2, seed=1) if weighted else None
    assert gradcheck(lambda rows, w: combine(rows, PLAN.row_index, PLAN.row_choice, w), (leaf(10, 3), weights))


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_grouped_gemm(transposed, biased):
    weight = leaf(4, 2, 3, seed=1) if transposed else leaf(4, 3, 2, seed=1)
    bias = leaf(4, 2, seed=2) if biased else None
    assert gradcheck(
        lambda rows, w, b: grouped_gemm(rows, w, PLAN.offsets, b, transposed=transposed), (leaf(10, 3), weight, bias)
    )


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("routed", [True, False])
@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_expert_ffn(transposed, gated, routed, activation):
    shape = (4, 5, 3) if transposed else (4, 3, 5)

    def function(tokens, weights, fc1, fc2, value, fc1_bias, fc2_bias):
        routes = Routes(IDS, weights, PLAN.row_index, PLAN.row_choice) if routed else None
        options = {"activation": activation, "transposed": transposed, "routes": routes}
        return expert_ffn(tokens, fc1, fc2, PLAN.offsets, value=value, fc1_bias=fc1_bias, fc2_bias=fc2_bias, **options)

    arguments = [leaf(5 if routed else 10, 3), leaf(5, 2, seed=1) if routed else None, leaf(*shape, seed=2)]
    arguments += [
        leaf(4, 5, 2, seed=3),
        leaf(*shape, seed=4) if gated else None,
        leaf(4, 5, seed=5),
        leaf(4, 2, seed=6),
    ]
    assert gradcheck(function, arguments)


@pytest.mark.parametrize("only", range(7))
def test_experts_input_alone_needs_gradient(only):
    shapes = [(5, 3), (5, 2), (4, 3, 5), (4, 5, 2), (4, 3, 5), (4, 5), (4, 2)]
    arguments = [random_values(shape, seed=index) for index, shape in enumerate(shapes)]
    arguments[only].requires_grad_()

    def function(tokens, weights, fc1, fc2, value, fc1_bias, fc2_bias):
        routes = Routes(IDS, weights, PLAN.row_index, PLAN.row_choice)
        options = {"value": value, "fc1_bias": fc1_bias, "fc2_bias": fc2_bias, "routes": routes}
        return expert_ffn(tokens, fc1, fc2, PLAN.offsets, activation="silu", **options)

    assert gradcheck(function, arguments)


@pytest.mark.parametrize("only", [0, 1, 2])
def test_inputs_that_need_no_gradient_get_none(only):
    arguments = [random_values(shape, seed=index) for index, shape in enumerate([(10, 3), (4, 3, 2), (4, 2)])]
    arguments[only].requires_grad_()
    assert gradcheck(lambda rows, w, b: grouped_gemm(rows, w, PLAN.offsets, b), arguments)
    if only < 2:
        arguments = [random_values((10, 3)), random_values((5, 2))]
        arguments[only].requires_grad_()
        assert gradcheck(lambda rows, w: combine(rows, PLAN.row_index, PLAN.row_choice, w), arguments)
        arguments = [random_values((5, 3)), random_values((5, 2))]
        arguments[only].requires_grad_()
        assert gradcheck(lambda tokens, w: dispatch(tokens, PLAN.row_index, PLAN.row_choice, w), arguments)


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("is_postscore", [True, False])
@pytest.mark.parametrize("capacity_factor", [0.0, 0.5])
def test_layer(top_k, is_postscore, capacity_factor):
    layer = make_layer(
        model_dim=3, num_experts=4, hidden_size=2, top_k=top_k, capacity_factor=capacity_factor,
        dtype=torch.float64, is_postscore=is_postscore,
        # Smooth, unlike relu.
        experts={"activation_fn": torch.tanh},
    )  # fmt: skip
    names = [name for name, _ in layer.named_parameters()]

    def function(tokens, *parameters):
        output = torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (tokens,))
        return output, output.l_aux

    tokens = leaf(7, 3)
    assert gradcheck(function, (tokens, *layer.parameters()))
    if capacity_factor:
        counts = layer.dispatch_count
        assert counts.max() > top_k * int(capacity_factor * 2), "this capacity is meant to drop something"


@pytest.mark.parametrize(
    "function",
    [
        lambda x: select_experts(x, 2).weights,
        lambda x: dispatch(x, PLAN.row_index, PLAN.row_choice),
        lambda x: combine(x.repeat(2, 1), PLAN.row_index, PLAN.row_choice),
        lambda x: grouped_gemm(x.repeat(2, 1), x.new_ones(4, 4, 2, requires_grad=True), PLAN.offsets),
    ],
    ids=["select_experts", "dispatch", "combine", "grouped_gemm"],
)
def test_second_derivatives_are_refused(function):
    x = leaf(5, 4)
    (grad,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"differentiate twice.*once_differentiable"):
        grad.sum().backward()
