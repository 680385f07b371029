"""The layer where cliffs would be: skewed and empty experts, odd and extreme sizes, and shapes drawn at random."""

import random
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from benches.workload import Case, Results, Side, Workload
from benches.workloads import skew
from benches.workloads.layer import Sizes, forward_side
from benches.workloads.layer_work import experts_touched, forward_work, step_work

_Chances = Callable[[int], Tensor]
#: Up to so many tokens, several inputs are taken in turn: each touches other experts.
_FEW_TOKENS = 64


def _inputs(sizes: Sizes, chances: _Chances | None, layers: dict[str, nn.Module]) -> list[Tensor]:
    if chances is not None:
        skew.aim_gate(layers)
        return [skew.tokens_with(chances, sizes)]
    return sizes.inputs(16 if sizes.tokens <= _FEW_TOKENS else 1)


def forward_case(sizes: Sizes, chances: _Chances | None = None) -> Case:
    """Make a forward pass."""
    layers = sizes.layers()
    inputs = _inputs(sizes, chances, layers)
    work = forward_work(
        sizes.dtype,
        tokens=sizes.tokens,
        top_k=sizes.top_k,
        width=sizes.width,
        hidden=sizes.hidden,
        matrices=2,
        touched=experts_touched(layers["tutel"], inputs),
    )
    ours, *peers = (forward_side(name, layer, inputs) for name, layer in layers.items())
    return Case(ours, peers, work, len(inputs))


def step(layer: nn.Module, given: Tensor) -> Results:
    """Run forward and backward; return output and the input's gradient."""
    tokens = given.detach().requires_grad_()
    for parameter in layer.parameters():
        parameter.grad = None
    output = layer(tokens)
    output.backward(torch.ones_like(output))
    assert tokens.grad is not None
    return output.detach(), tokens.grad


def step_case(sizes: Sizes, chances: _Chances | None = None) -> Case:
    """Make a forward and backward pass."""
    layers = sizes.layers()
    [tokens] = _inputs(sizes, chances or skew.uniform, layers)
    work = step_work(
        sizes.dtype,
        tokens=sizes.tokens,
        top_k=sizes.top_k,
        width=sizes.width,
        hidden=sizes.hidden,
        experts=sizes.experts,
        matrices=2,
        touched=experts_touched(layers["tutel"], [tokens]),
    )
    ours, *peers = (Side(name, partial(step, layer, tokens)) for name, layer in layers.items())
    return Case(ours, peers, work)


def random_sizes(seed: int, dtype: torch.dtype) -> Sizes:
    """Draw a shape; the same for the same seed."""
    draw = random.Random(seed)
    experts = draw.randint(1, 96)
    return Sizes(
        dtype,
        batch=1,
        tokens=draw.randint(1, 3000),
        width=draw.randint(100, 1200),
        experts=experts,
        hidden=draw.randint(100, 1600),
        top_k=draw.randint(1, min(8, experts)),
    )


def _skews() -> list[tuple[str, Sizes, _Chances]]:
    made: list[tuple[str, Sizes, _Chances]] = []
    for dtype in (torch.float32, torch.bfloat16):
        # One expert cannot have more than half of the rows of two choices a token.
        one, two = (Sizes(dtype, 1, 4096, 512, 64, 512, top_k) for top_k in (1, 2))
        made += [("uniform", two, skew.uniform), ("zipf", two, skew.zipf), ("half_empty", two, skew.half_empty)]
        made += [("uniform", one, skew.uniform), ("one_takes_90_percent", one, skew.one_hot)]
    return made


def _edges() -> list[tuple[str, Sizes]]:
    made = []
    for dtype in (torch.float32, torch.bfloat16):
        made += [
            ("odd", Sizes(dtype, 1, 777, 1000, 8, 1365, 2)),
            ("odd", Sizes(dtype, 1, 1023, 769, 7, 1111, 3)),
            ("even", Sizes(dtype, 1, 1024, 1024, 8, 1344, 2)),
            ("one_token", Sizes(dtype, 1, 1, 1000, 8, 1365, 2)),
            ("one_expert", Sizes(dtype, 1, 1024, 1024, 1, 1024, 1)),
            ("mostly_empty", Sizes(dtype, 1, 16, 512, 256, 512, 2)),
            *((f"seed{seed}", random_sizes(seed, dtype)) for seed in range(1, 6)),
        ]
    return made


def _workloads() -> list[Workload]:
    made = []
    for name, sizes, chances in _skews():
        for kind, build in (("forward", forward_case), ("train", step_case)):
            case = partial(build, sizes, chances)
            made.append(Workload(f"skew.{kind}.{name}.{sizes}", sizes.dtype, case, brief=True))
    for name, sizes in _edges():
        made.append(Workload(f"shape.forward.{name}.{sizes}", sizes.dtype, partial(forward_case, sizes), brief=True))
        if name == "odd":
            made.append(Workload(f"shape.train.{name}.{sizes}", sizes.dtype, partial(step_case, sizes), brief=True))
    return made


WORKLOADS = _workloads()
