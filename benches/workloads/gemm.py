"""The experts' products, against a loop of torch.mm and torch's own grouped product."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from tutel.functional import grouped_gemm

from benches.floors import FRESH_FROM, Work
from benches.workload import SHORT_NAMES, Case, Results, Side, Workload

_Product = Callable[[Tensor, Tensor, Tensor, list[int]], Tensor]


@dataclass(frozen=True)
class Shape:
    """Rows of width D times [E, D, N].

    Several loads are taken in turn, so that a decode step does not find its few experts' weights in the cache.
    """

    name: str
    inner: int
    outer: int
    loads: Sequence[Sequence[int]]
    transposed: bool = False

    @property
    def experts(self) -> int:
        """E."""
        return len(self.loads[0])

    def work(self, dtype: torch.dtype, train: bool) -> Work:
        """Mean work of a load: each touched matrix is read once, each output written once."""
        rows = sum(map(sum, self.loads)) // len(self.loads)
        touched = sum(count > 0 for load in self.loads for count in load) // len(self.loads)
        weights = touched * self.inner * self.outer * dtype.itemsize
        values = rows * (self.inner + self.outer) * dtype.itemsize
        output = rows * self.outer * dtype.itemsize
        grads = self.experts * self.inner * self.outer * dtype.itemsize
        fresh = [output, rows * self.inner * dtype.itemsize, grads] if train else [output]
        return Work(
            dtype,
            flops=2 * rows * self.inner * self.outer * (3 if train else 1),
            read=weights * (2 if train else 1),
            moved=values * (3 if train else 1) + (grads if train else 0),
            fresh=sum(size for size in fresh if size >= FRESH_FROM),
        )


def _loop(rows: Tensor, weight: Tensor, _offsets: Tensor, ends: list[int]) -> Tensor:
    """Products into their places; with gradients, split and unbind.

    Slices would be a straw man: the backward of each makes zeros of the size of all rows, or of all experts' weights.
    """
    pieces = list(itertools.pairwise([0, *ends]))
    if torch.is_grad_enabled():
        parts = torch.split(rows, [end - begin for begin, end in pieces])
        return torch.cat([part @ matrix for part, matrix in zip(parts, weight.unbind(), strict=True)])
    output = rows.new_empty(rows.shape[0], weight.shape[2])
    for expert, (begin, end) in enumerate(pieces):
        if end > begin:
            torch.mm(rows[begin:end], weight[expert], out=output[begin:end])
    return output


def _grouped_mm(rows: Tensor, weight: Tensor, offsets: Tensor, _ends: list[int]) -> Tensor:
    return F.grouped_mm(rows, weight, offs=offsets[1:].to(torch.int32))


def _side(name: str, product: _Product, tensors: tuple[Tensor, Tensor], loads: list[Tensor], train: bool) -> Side:
    rows, weight = tensors
    turns = itertools.cycle([(offsets, offsets[1:].tolist()) for offsets in loads])
    grad = torch.ones(rows.shape[0], weight.shape[2], dtype=rows.dtype) if train else None

    def run() -> Results:
        offsets, ends = next(turns)
        if grad is None:
            with torch.no_grad():
                return (product(rows[: ends[-1]], weight, offsets, ends),)
        output = product(rows, weight, offsets, ends)
        return output.detach(), *torch.autograd.grad([output], [rows, weight], [grad])

    return Side(name, run)


def build(shape: Shape, dtype: torch.dtype, train: bool) -> Case:
    """Make a product ready."""
    generator = torch.Generator().manual_seed(0)
    count = max(map(sum, shape.loads))
    rows = torch.randn(count, shape.inner, generator=generator).to(dtype).requires_grad_(train)
    stored = (shape.experts, *((shape.outer, shape.inner) if shape.transposed else (shape.inner, shape.outer)))
    parameter = torch.randn(stored, generator=generator).to(dtype).requires_grad_(train)
    weight = parameter.transpose(1, 2) if shape.transposed else parameter
    loads = [torch.tensor([0, *itertools.accumulate(load)]) for load in shape.loads]

    def ours(rows: Tensor, weight: Tensor, offsets: Tensor, _ends: list[int]) -> Tensor:
        stored = weight.transpose(1, 2) if shape.transposed else weight
        return grouped_gemm(rows, stored, offsets, transposed=shape.transposed)

    tensors = (rows, weight)
    peers = [_side("loop of torch.mm", _loop, tensors, loads, train)]
    if dtype != torch.float64 and hasattr(F, "grouped_mm"):
        peers.append(_side("torch grouped_mm", _grouped_mm, tensors, loads, train))
    return Case(_side("tutel", ours, tensors, loads, train), peers, shape.work(dtype, train), len(loads))


def _choices(experts: int, top_k: int, tokens: int, steps: int) -> list[list[int]]:
    """Rows an expert gets in each of some decode steps."""
    generator = torch.Generator().manual_seed(0)
    loads = []
    for _ in range(steps):
        ids = torch.rand(tokens, experts, generator=generator).topk(top_k, dim=1).indices
        loads.append(torch.bincount(ids.flatten(), minlength=experts).tolist())
    return loads


def _workloads() -> list[Workload]:
    fp32, fp64, bf16, fp16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
    few_large = Shape("few_large_E4_R4096", 2048, 2048, [[1024] * 4])
    few_transposed = Shape("few_large_transposed_E4_R4096", 2048, 2048, [[1024] * 4], transposed=True)
    # Torch's grouped product in fp16 reaches 1 GFLOP/s or so on a CPU: little is asked of it.
    few_small = Shape("few_small_E4_R256", 512, 512, [[64] * 4])
    many_small = Shape("many_small_E128_R8192", 1024, 384, _choices(128, 8, 1024, 1))
    one_hot = Shape("one_hot_E64_R4096", 1024, 1024, [[4096 - 63 * 6, *[6] * 63]])
    cases = [
        *((few_large, dtype, False) for dtype in (fp32, fp64, bf16)),
        (few_small, fp16, False),
        (few_transposed, fp32, False),
        *((shape, dtype, False) for shape in (many_small, one_hot) for dtype in (fp32, bf16)),
        *((shape, dtype, True) for shape in (few_large, many_small) for dtype in (fp32, bf16)),
    ]
    # The sizes of Mixtral's and Qwen3's blocks, with a hidden state of 1024.
    for block, inner, outer, experts, top_k in (("mixtral", 1024, 3584, 8, 2), ("qwen3", 1024, 384, 128, 8)):
        for tokens in (1, 8):
            shape = Shape(f"decode_{block}_T{tokens}", inner, outer, _choices(experts, top_k, tokens, 16))
            cases += [(shape, fp32, False), (shape, bf16, False)]
    return [
        Workload(
            f"gemm.{'train' if train else 'forward'}.{SHORT_NAMES[dtype]}.{shape.name}",
            dtype,
            partial(build, shape, dtype, train),
        )
        for shape, dtype, train in cases
    ]


WORKLOADS = _workloads()
