"""The losses that the project published, on this machine's CPU."""

import pytest
import torch
from published import FP32, FP64, FP64_FIRST_LOSS, Run, losses_of


@pytest.mark.slow
@pytest.mark.parametrize("run", FP32, ids=lambda run: f"top={run.top}, experts={run.num_local_experts}")
def test_fp32(run):
    assert losses_of(run, 3) == pytest.approx(run.losses, abs=5e-4, rel=0)


def test_fp64():
    found = losses_of(FP64, 3)
    assert found == pytest.approx(FP64.losses, abs=5e-2, rel=0)
    assert found[0] == pytest.approx(FP64_FIRST_LOSS, abs=1e-8, rel=0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("top", [1, 2])
def test_half_precision_against_fp64_on_the_same_values(dtype, top):
    """The first loss of a smaller model, whose weights and tokens are the half ones widened to fp64.

    A token's logit is the sum of D outputs. Each output carries the roundings of its hidden units, of itself before
    and after the weights: about 3 * eps / 2 of its size, independent from output to output, so that the logit's error
    is about sqrt(D) * 1.5 * eps * |output|; one rounding of the logit itself adds eps / 2 * |logit|. The loss is a
    difference of two logits (its log-sum-exp is at most the largest error off), rounded to the dtype once more.
    """
    width, num_tokens = 256, 512
    sizes = {"model_dim": width, "hidden_size": width, "num_tokens": num_tokens}
    half = losses_of(Run(top, 2, 2, dtype, ()), 1, **sizes)[0]

    torch.manual_seed(0)
    exact = exact_loss(top, dtype, **sizes)
    eps = torch.finfo(getattr(torch, dtype)).eps
    output_size, logit_size = exact["output"], exact["logit"]
    per_logit = 1.5 * eps * output_size * width**0.5 + eps / 2 * logit_size
    # Four standard deviations of a logit's error, twice for the difference, and the loss's own rounding.
    bound = 2 * 4 * per_logit + eps * abs(exact["loss"])
    assert abs(half - exact["loss"]) <= bound
    assert bound < 0.1 * abs(exact["loss"]), "a bound that says something"


def exact_loss(top, dtype, *, model_dim, hidden_size, num_tokens):
    """The loss in fp64, and the sizes (root mean squares) of outputs and logits, from the half model's values."""
    from tutel.examples import helloworld

    options = helloworld.parse_arguments(
        [
            f"--top={top}",
            f"--dtype={dtype}",
            f"--model_dim={model_dim}",
            f"--hidden_size={hidden_size}",
            f"--num_tokens={num_tokens}",
            "--batch_size=2",
            "--device=cpu",
        ]
    )
    half = getattr(torch, dtype)
    torch.set_default_dtype(half)
    model = helloworld.ExampleModel(options)
    torch.manual_seed(0)
    tokens = torch.randn((2, num_tokens, model_dim), dtype=torch.float32).to(half).double()
    labels = torch.empty(2, dtype=torch.int64).random_(1)
    # Tokens may only choose other experts where half logits tie; ask for the same choices by the same gate.
    model.double()
    with torch.no_grad():
        output = model._moe_layer(tokens)
        logits = output.sum(dim=2)
        loss = torch.nn.functional.nll_loss(torch.log_softmax(logits, dim=1), labels)
    return {
        "loss": loss.item(),
        "output": output.square().mean().sqrt().item(),
        "logit": logits.square().mean().sqrt().item(),
    }
