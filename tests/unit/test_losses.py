"""The auxiliary losses of a layer, by hand."""

import math

import pytest
import torch
from reference import make_layer

from tutel import moe

LOADS = {"is_gshard_loss": False, "gate": {"gate_noise": 1.0}}


def with_logits(rows, dtype=torch.float64, **options):
    """A layer whose gate gives these logits: the tokens are the rows and the gate's weight is the identity."""
    rows = torch.tensor(rows, dtype=dtype)
    width = rows.shape[1]
    layer = make_layer(model_dim=width, num_experts=width, **options)
    layer.to(dtype).eval()
    with torch.no_grad():
        layer.gates[0].wg.weight.copy_(torch.eye(width))
    return layer, rows


def softmax(row):
    powers = [math.exp(value) for value in row]
    return [power / sum(powers) for power in powers]


def phi(x):
    return (1 + math.erf(x / math.sqrt(2))) / 2


def squared_variation(values):
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return variance / (mean**2 + 1e-10)


ROWS = [[1.0, 0.0, -0.5], [0.0, 2.0, 1.0], [0.25, 0.5, 0.0], [-1.0, 0.0, 0.75]]


def test_gshard():
    layer, tokens = with_logits(ROWS)
    layer(tokens)
    scores = [softmax(row) for row in ROWS]
    first = [1, 2, 1]
    expected = 3 / 4**2 * sum(sum(row[e] for row in scores) * first[e] for e in range(3))
    assert layer.l_aux.shape == ()
    assert layer.l_aux.item() == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("noise", [1.0, 0.3])
def test_load_importance(top_k, noise):
    # In eval mode no noise is drawn, and the threshold is the K-th largest logit.
    layer, tokens = with_logits(ROWS, top_k=top_k, is_gshard_loss=False, gate={"gate_noise": noise})
    layer(tokens)
    scores = [softmax(row) for row in ROWS]
    thresholds = [sorted(row, reverse=True)[top_k - 1] for row in ROWS]
    importance = [sum(row[e] for row in scores) for e in range(3)]
    load = [
        sum(phi((row[e] - theta) / (noise / 3)) for row, theta in zip(scores, thresholds, strict=True))
        for e in range(3)
    ]
    expected = (squared_variation(importance) + squared_variation(load)) / 2
    assert layer.l_aux.dtype == torch.float32
    assert layer.l_aux.item() == pytest.approx(expected, rel=1e-5)


def test_load_importance_in_training_uses_the_chosen_noisy_logits():
    layer, tokens = with_logits(ROWS, **LOADS)
    layer.train()
    torch.manual_seed(5)
    layer(tokens)
    torch.manual_seed(5)
    noisy = tokens + torch.randn_like(tokens) / 3
    scores = torch.softmax(tokens, 1)
    theta = noisy.topk(2).values[:, 1:]
    load = [sum(phi(x) for x in column) for column in ((scores - theta) * 3).T.tolist()]
    expected = (squared_variation(scores.sum(0).tolist()) + squared_variation(load)) / 2
    assert layer.l_aux.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("options", [{}, LOADS], ids=["gshard", "load-importance"])
def test_gradients_are_those_of_differences(options):
    layer, tokens = with_logits(ROWS, **options)

    def loss(tokens):
        layer(tokens)
        return layer.l_aux.double()

    leaf = tokens.clone().requires_grad_()
    loss(leaf).backward()
    step, index = 1e-3 if options else 1e-6, (1, 2)
    up, down = tokens.clone(), tokens.clone()
    up[index] += step
    down[index] -= step
    slope = (loss(up) - loss(down)).item() / (2 * step)
    assert leaf.grad[index].item() == pytest.approx(slope, rel=5e-3)


@pytest.mark.parametrize("options", [{}, LOADS], ids=["gshard", "load-importance"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_tokens(options, dtype):
    layer = make_layer(**options).to(dtype)
    tokens = torch.zeros(0, 6, dtype=dtype, requires_grad=True)
    output = layer(tokens)
    (output.sum() + layer.l_aux).backward()
    assert layer.l_aux.item() == 0
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in layer.gates.parameters() if p.grad is not None)


def test_one_expert():
    tokens = torch.randn(5, 6)
    layer = make_layer(num_experts=1, top_k=1)
    layer(tokens)
    assert layer.l_aux.item() == pytest.approx(1.0)  # 1 / T^2 * (T * 1) * T
    layer = make_layer(num_experts=1, top_k=1, **LOADS)
    output = layer(tokens)
    (output.sum() + layer.l_aux).backward()
    assert layer.l_aux.item() == 0
    assert not layer.gates[0].wg.weight.grad.isnan().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gshard_takes_its_means_in_a_half_type(dtype):
    layer, tokens = with_logits(ROWS, dtype)
    layer(tokens)
    sums = torch.softmax(tokens.float(), 1).sum(0)
    shares = torch.tensor([1, 2, 1]) / 4
    expected = 3 * torch.sum((sums / 4).to(dtype) * shares.to(dtype))
    assert layer.l_aux.dtype == dtype
    assert layer.l_aux.item() == pytest.approx(expected.item(), rel=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gshard_of_an_fp32_gate_is_fp32(dtype):
    layer, tokens = with_logits(ROWS, dtype, gate={"fp32_gate": True})
    layer(tokens)
    sums = torch.softmax(tokens.float(), 1).sum(0)
    assert layer.l_aux.dtype == torch.float32
    assert layer.l_aux.item() == pytest.approx(3 / 16 * (sums @ torch.tensor([1.0, 2.0, 1.0])).item(), rel=1e-6)


def test_load_importance_is_fp32_in_half_types():
    layer, tokens = with_logits(ROWS, torch.bfloat16, **LOADS)
    layer(tokens)
    half = layer.l_aux
    layer, tokens = with_logits(ROWS, torch.float32, **LOADS)
    layer(tokens)
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(layer.l_aux.item(), rel=1e-5)  # these logits are exact in bf16


@pytest.mark.parametrize("training", [True, False])
def test_load_importance_needs_noise(training):
    layer = make_layer(is_gshard_loss=False).train(training)
    with pytest.raises(ValueError, match=r"is_gshard_loss=False.*gate_noise > 0, got 0"):
        layer(torch.randn(3, 6))


def test_megatron_has_none():
    layer = moe.moe_layer({"type": "megatron"}, 6, {"hidden_size_per_expert": 4})
    layer(torch.randn(3, 6))
    assert layer.l_aux.item() == 0
