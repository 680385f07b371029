"""torch.compile: one graph without breaks, the same results as eager, no new graph for each number of tokens."""

import shutil

import pytest
import torch
from reference import make_layer, random_values
from torch._dynamo.testing import CompileCounterWithBackend

SIZES = [5, 7, 9, 3, 20, 40, 2, 33, 8, 64]


pytestmark = pytest.mark.usefixtures("fresh_compiler")


def step(function, layer, tokens):
    """Output, auxiliary loss and every gradient of one step."""
    layer.zero_grad()
    leaf = tokens.clone().requires_grad_()
    output = function(leaf)
    l_aux = layer.l_aux
    (output.square().sum() + l_aux).backward()
    return [output.detach(), l_aux.detach(), leaf.grad, *(parameter.grad for parameter in layer.parameters())]


def check(layer, backend, sizes, dtype):
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for num_tokens in sizes:
        tokens = random_values((num_tokens, layer.model_dim), dtype, seed=num_tokens)
        torch.testing.assert_close(step(compiled, layer, tokens), step(layer, layer, tokens))


@pytest.mark.parametrize("capacity_factor", [0.0, 1.0, 1.3, -0.7])
@pytest.mark.parametrize("is_postscore", [True, False])
def test_layer(capacity_factor, is_postscore):
    layer = make_layer(capacity_factor=capacity_factor, is_postscore=is_postscore)
    backend = CompileCounterWithBackend("aot_eager")
    check(layer, backend, SIZES, torch.float32)
    assert backend.frame_count <= 2


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 1},
        {"batch_prioritized_routing": True},
        {"gate": {"fp32_gate": True}, "dtype": torch.bfloat16},
        {"experts": {"activation_fn": torch.nn.GELU(), "has_fc1_bias": False, "output_dim": 3}},
    ],
    ids=["k=1", "prioritized", "fp32_gate", "experts"],
)
def test_options(options):
    check(make_layer(**options), "aot_eager", [5, 9, 16], options.get("dtype", torch.float32))


def test_leading_dimensions():
    layer = make_layer()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for shape in [(2, 3, 6), (4, 5, 6), (7, 2, 6)]:
        tokens = random_values(shape, torch.float32)
        torch.testing.assert_close(compiled(tokens), layer(tokens))


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor():
    check(make_layer(), "inductor", [5, 9], torch.float32)


# torch reminds of l_aux and dispatch_count, which the program does not set.
@pytest.mark.filterwarnings("ignore:The tensor attributes:UserWarning")
def test_export():
    layer = make_layer().eval()
    tokens = random_values((5, 6), torch.float32)
    program = torch.export.export(layer, (tokens,), dynamic_shapes=({0: torch.export.Dim("tokens", min=2)},))
    for num_tokens in (5, 6, 11):
        tokens = random_values((num_tokens, 6), torch.float32)
        torch.testing.assert_close(program.module()(tokens), layer(tokens))
