"""torch.compile of layers of every kind: one graph, eager's results, and no new graph for each number of tokens."""

import pytest
import torch
from matrix import cases
from reference import random_values
from torch._dynamo.testing import CompileCounterWithBackend

# At least 5: with fewer tokens the capacity is 0, and torch always gives tensors without elements a graph of their own.
SIZES = [12, 7, 9, 30, 20, 40, 5, 33, 8, 64]

#: Modules are called on exactly their rows, whose numbers are read on the host: they take part in eager parts only.
READ_ON_THE_HOST = {"module_list", "module"}

PAIRS = [("top", experts) for experts in cases.KINDS if experts not in READ_ON_THE_HOST]
PAIRS += [(gate, experts) for gate in ("cosine_top", "custom") for experts in ("ffn", "custom")]
PAIRS += [("megatron", "ffn")]


pytestmark = pytest.mark.usefixtures("fresh_compiler")


def step(function, layer, tokens):
    layer.zero_grad()
    leaf = tokens.clone().requires_grad_()
    output = function(leaf)
    (output.square().sum() + layer.l_aux).backward()
    results = [output.detach(), layer.l_aux.detach(), leaf.grad, *(p.grad for p in layer.parameters())]
    return [value for value in results if value is not None]


def check(layer, sizes, **options):
    compiled = torch.compile(layer, **options)
    for count in sizes:
        tokens = random_values((count, cases.MODEL_DIM), torch.float32, seed=count)
        torch.testing.assert_close(step(compiled, layer, tokens), step(layer, layer, tokens), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("gate", "experts"), PAIRS)
def test_one_graph(gate, experts):
    backend = CompileCounterWithBackend("aot_eager")
    check(cases.make_layer(gate, experts, capacity="positive"), SIZES, backend=backend, fullgraph=True)
    assert backend.frame_count <= 2


@pytest.mark.parametrize("experts", ["ffn"])
def test_one_graph_of_a_dropless_layer_that_weighs_inputs(experts):
    backend = CompileCounterWithBackend("aot_eager")
    check(cases.make_layer("top", experts, score_at="dispatch"), SIZES, backend=backend, fullgraph=True)
    assert backend.frame_count <= 2


# torch's own, when it looks at a tensor between two graphs.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("experts", ["module_list", "custom"])
def test_numbers_of_rows_that_the_host_reads_work_without_fullgraph(experts):
    check(cases.make_layer("top", experts), SIZES[:4], backend="aot_eager")


@pytest.mark.parametrize("gate", cases.GATES)
def test_explain_shows_no_break(gate):
    layer = cases.make_layer(gate, "ffn")
    found = torch._dynamo.explain(layer)(random_values((12, cases.MODEL_DIM), torch.float32))
    assert (found.graph_count, found.graph_break_count, found.break_reasons) == (1, 0, [])


def test_noise_is_drawn_in_a_graph():
    layer = cases.make_layer("top", "ffn")
    layer.gates[0].gate_noise = 3.0
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    tokens = random_values((12, cases.MODEL_DIM), torch.float32)
    torch.manual_seed(1)
    first = compiled(tokens)
    assert not torch.equal(first, compiled(tokens))
    torch.manual_seed(1)
    assert torch.equal(first, compiled(tokens))
    assert torch.isfinite(first).all()


def test_load_importance_loss_in_a_graph():
    layer = cases.make_layer("top", "ffn", is_gshard_loss=False).eval()
    layer.gates[0].gate_noise = 1.0
    check(layer, SIZES[:4], backend="aot_eager", fullgraph=True)
