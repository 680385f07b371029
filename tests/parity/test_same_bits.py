"""Equal bits for every number of threads and for every run, forward and backward."""

import pytest
import torch
from reference import DTYPES, accumulator, assert_same_bits, make_layer, random_values
from tutel.functional import Routes, assign_rows, combine, dispatch, expert_ffn, grouped_gemm, select_experts

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# Large enough for several tasks in every operator.
TOKENS, EXPERTS, TOP_K, WIDTH = 1500, 12, 3, 129
RUNS = [1, 2, 4, 4, 1]


def on_threads(run):
    """Run with several numbers of threads, and twice with some; all must agree."""
    results = []
    for threads in RUNS:
        torch.set_num_threads(threads)
        results.append(run())
    for threads, result in zip(RUNS[1:], results[1:], strict=True):
        assert result.keys() == results[0].keys()
        for name, value in result.items():
            if value.is_floating_point():
                assert_same_bits(f"{name}, {threads} threads", value, results[0][name])
            else:
                assert torch.equal(value, results[0][name])
    return results[0]


def step(function, **arguments):
    """Values and gradients of a function of tensors, by name."""
    inputs = {name: value.detach().clone().requires_grad_() for name, value in arguments.items()}
    output = function(**inputs)
    output.backward(random_values(output.shape, output.dtype, seed=8))
    return {"output": output.detach(), **{name: leaf.grad for name, leaf in inputs.items()}}


@dtypes
def test_select_experts(dtype):
    logits = random_values((TOKENS, 100), dtype)

    def run():
        leaf = logits.clone().requires_grad_()
        chosen = select_experts(leaf, TOP_K)
        sums = random_values(chosen.score_sums.shape, chosen.weights.dtype)
        (chosen.weights.sum() + (chosen.score_sums * sums).sum()).backward()
        return {**{name: value.detach() for name, value in chosen._asdict().items()}, "gradient": leaf.grad}

    on_threads(run)


@dtypes
@pytest.mark.parametrize("capacity", [None, 300])
def test_rows_and_products(dtype, capacity):
    ids = select_experts(random_values((TOKENS, EXPERTS)), TOP_K).ids
    plan = assign_rows(ids, EXPERTS, capacity=capacity)
    index, choice = plan.row_index, plan.row_choice
    tokens, rows = random_values((TOKENS, WIDTH), dtype), random_values((TOKENS * TOP_K, WIDTH), dtype)
    weights = random_values((TOKENS, TOP_K), accumulator(dtype), seed=4)
    matrices, bias = random_values((EXPERTS, WIDTH, 70), dtype), random_values((EXPERTS, 70), dtype)
    on_threads(lambda: plan._asdict() | assign_rows(ids, EXPERTS, capacity=capacity)._asdict())
    on_threads(
        lambda: step(lambda tokens, weights: dispatch(tokens, index, choice, weights), tokens=tokens, weights=weights)
    )
    on_threads(lambda: step(lambda rows, weights: combine(rows, index, choice, weights), rows=rows, weights=weights))
    on_threads(
        lambda: step(
            lambda rows, weight, bias: grouped_gemm(rows, weight, plan.offsets, bias),
            rows=rows,
            weight=matrices,
            bias=bias,
        )
    )
    on_threads(
        lambda: step(
            lambda rows, weight: grouped_gemm(rows, weight, plan.offsets, transposed=True),
            rows=rows,
            weight=matrices.mT.contiguous(),
        )
    )


@dtypes
@pytest.mark.parametrize("capacity_factor", [0.0, 0.7])
def test_layer(dtype, capacity_factor):
    layer = make_layer(
        model_dim=48, num_experts=8, hidden_size=70, top_k=2, capacity_factor=capacity_factor, dtype=dtype
    )
    tokens = random_values((700, 48), dtype)

    def run():
        layer.zero_grad()
        leaf = tokens.clone().requires_grad_()
        output = layer(leaf)
        (output.square().sum() + output.l_aux).backward()
        grads = {name: parameter.grad for name, parameter in layer.named_parameters()}
        return {"output": output.detach(), "l_aux": output.l_aux.detach(), "tokens": leaf.grad, **grads}

    on_threads(run)


@dtypes
def test_a_token_has_the_same_bits_alone_and_in_a_batch(dtype):
    # Capacity aside, nothing after the logits depends on the other tokens.
    logits, tokens = random_values((40, 8), dtype), random_values((40, 33), dtype)
    matrices = random_values((8, 33, 17), dtype)

    def output_of(part):
        chosen = select_experts(logits[part], 2)
        plan = assign_rows(chosen.ids, 8)
        rows = grouped_gemm(dispatch(tokens[part], plan.row_index, plan.row_choice), matrices, plan.offsets)
        routes = Routes(chosen.ids, chosen.weights, plan.row_index, plan.row_choice)
        fused = expert_ffn(tokens[part], matrices, matrices.mT, plan.offsets, activation="gelu", routes=routes)
        return torch.cat([combine(rows, plan.row_index, plan.row_choice, chosen.weights), fused], dim=1)

    batch = output_of(slice(None))
    for t in (0, 7, 39):
        assert_same_bits(f"token {t}", output_of(slice(t, t + 1))[0], batch[t])
