"""The whole layer: the training step of the helloworld example, and decode steps."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tutel.moe import MOELayer

from benches.floors import FRESH_FROM, Work
from benches.workload import SHORT_NAMES, Case, Results, Side, Workload
from benches.workloads.layer_peers import GroupedLayer, LoopLayer
from benches.workloads.layer_work import experts_touched, forward_work


@dataclass(frozen=True)
class Sizes:
    """Batch B of S tokens, width D, E experts with H hidden units, K of them a token. Nothing is dropped.

    The gate computes in fp32 at least, ours and the peers': among 64 logits in bf16 the second and the third are equal
    for one token in 50, and who wins a tie is each side's own choice.
    """

    dtype: torch.dtype
    batch: int
    tokens: int
    width: int
    experts: int
    hidden: int
    top_k: int

    def __str__(self) -> str:
        return (
            f"{SHORT_NAMES[self.dtype]}.E{self.experts}_k{self.top_k}_T{self.batch * self.tokens}"
            f"_D{self.width}_H{self.hidden}"
        )

    @property
    def rows(self) -> int:
        """R."""
        return self.batch * self.tokens * self.top_k

    def inputs(self, count: int) -> list[Tensor]:
        """Draw inputs."""
        generator = torch.Generator().manual_seed(0)
        shape = (self.batch, self.tokens, self.width)
        return [torch.randn(shape, generator=generator).to(self.dtype) for _ in range(count)]

    def ours(self) -> MOELayer:
        """Make our layer."""
        return MOELayer(
            gate_type={"type": "top", "k": self.top_k, "capacity_factor": 0.0, "fp32_gate": self.dtype.itemsize < 4},
            model_dim=self.width,
            experts={"type": "ffn", "count_per_node": self.experts, "hidden_size_per_expert": self.hidden},
            seeds=(1, 1, 1),
        ).to(self.dtype)

    def layers(self) -> dict[str, nn.Module]:
        """Make our layer and its peers with equal weights."""
        ours = self.ours()
        layers = {"tutel": ours, "loop over nn experts": LoopLayer(ours, self.top_k)}
        # Torch's grouped product takes neither fp64 nor rows that are not whole multiples of 16 bytes.
        aligned = all(size * self.dtype.itemsize % 16 == 0 for size in (self.width, self.hidden))
        if self.dtype != torch.float64 and aligned and hasattr(F, "grouped_mm"):
            layers["sort + torch grouped_mm"] = GroupedLayer(ours, self.top_k)
        return layers


def _first_fc1_grad(layer: nn.Module) -> Tensor:
    if isinstance(layer, LoopLayer | GroupedLayer):
        grad = layer.first_fc1_grad()
    else:
        all_grads = layer.get_parameter("experts.batched_fc1_w").grad
        grad = None if all_grads is None else all_grads[0]
    assert grad is not None
    return grad


def _gradients(layer: nn.Module, tokens: Tensor) -> Results:
    """Output and gradients for a given gradient of the output.

    The example's own loss would do for exact numbers; in bf16 its softmax over sums of 2048 values is all rounding.
    """
    output = layer(tokens)
    generator = torch.Generator().manual_seed(1)
    output.backward(torch.randn(output.shape, generator=generator).to(output.dtype))
    results = [output.detach(), tokens.grad, _first_fc1_grad(layer)]
    found = [result.clone() for result in results if result is not None]
    layer.zero_grad()
    tokens.grad = None
    return found


def _training_side(name: str, layer: nn.Module, given: Tensor) -> Side:
    tokens = given.clone().requires_grad_()
    labels = torch.zeros(tokens.shape[0], dtype=torch.int64)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-5)

    def step() -> Results:
        loss = F.nll_loss(F.log_softmax(layer(tokens).sum(dim=2), dim=1), labels)
        optimizer.zero_grad()
        tokens.grad = None
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return (loss.detach(),)

    return Side(name, step, partial(_gradients, layer, tokens))


def _train(sizes: Sizes) -> Case:
    [tokens] = sizes.inputs(1)
    ours, *peers = (_training_side(name, layer, tokens) for name, layer in sizes.layers().items())
    matrix = sizes.experts * sizes.hidden * sizes.width * sizes.dtype.itemsize
    work = Work(
        sizes.dtype,
        flops=12 * sizes.rows * sizes.width * sizes.hidden,
        # Both matrices are read forward and backward; their gradients are written, and read by the step, which reads
        # and writes the parameters.
        read=2 * 2 * matrix,
        moved=4 * 2 * matrix,
        fresh=2 * matrix if matrix >= FRESH_FROM else 0,
    )
    return Case(ours, peers, work)


def forward_side(name: str, layer: nn.Module, inputs: list[Tensor]) -> Side:
    turns = itertools.cycle(inputs)

    @torch.no_grad()
    def run() -> Results:
        return (layer(next(turns)),)

    return Side(name, run)


def _decode(sizes: Sizes) -> Case:
    # Inputs in turn take other experts each: their weights come from memory, as in a model of many layers.
    inputs = sizes.inputs(16)
    layers = sizes.layers()
    ours, *peers = (forward_side(name, layer, inputs) for name, layer in layers.items())
    work = forward_work(
        sizes.dtype,
        tokens=sizes.batch * sizes.tokens,
        top_k=sizes.top_k,
        width=sizes.width,
        hidden=sizes.hidden,
        matrices=2,
        touched=experts_touched(layers["tutel"], inputs),
    )
    return Case(ours, peers, work, len(inputs))


HELLOWORLD = [
    *(Sizes(dtype, 2, 512, 2048, 2, 2048, 2) for dtype in (torch.float32, torch.float64, torch.bfloat16)),
    *(Sizes(dtype, 2, 512, 2048, 64, 512, 2) for dtype in (torch.float32, torch.bfloat16)),
]


def _workloads() -> list[Workload]:
    fp32, bf16 = torch.float32, torch.bfloat16
    kinds: list[tuple[str, Callable[[Sizes], Case], list[Sizes]]] = [
        ("train", _train, HELLOWORLD),
        ("decode", _decode, [Sizes(dtype, 1, tokens, 1024, 8, 3584, 2) for tokens in (1, 8) for dtype in (fp32, bf16)]),
    ]
    return [
        Workload(f"layer.{kind}.{sizes}", sizes.dtype, partial(build, sizes))
        for kind, build, listed in kinds
        for sizes in listed
    ]


WORKLOADS = _workloads()
