"""Curves: the layer along tokens, experts, choices, hidden units and threads, and the product along rows an expert."""

import os
from collections.abc import Iterator
from functools import partial

import torch

from benches.results import Point
from benches.workload import SHORT_NAMES, Workload
from benches.workloads import gemm
from benches.workloads.layer import Sizes
from benches.workloads.shapes import forward_case, step_case

_DTYPES = (torch.float32, torch.bfloat16)
#: A layer of moderate size: a curve has many points.
_WIDTH, _HIDDEN = 512, 512


def _sizes(dtype: torch.dtype, tokens: int, experts: int, hidden: int, top_k: int) -> Sizes:
    return Sizes(dtype, 1, tokens, _WIDTH, experts, hidden, top_k)


def _points(dtype: torch.dtype) -> Iterator[tuple[str, int, str, Sizes]]:
    """Yield axis, value, kind and sizes."""
    for tokens in (1, 8, 64, 512, 4096, 32768):
        yield "tokens", tokens, "forward", _sizes(dtype, tokens, 16, _HIDDEN, 2)
    for tokens in (64, 512, 4096):
        yield "tokens", tokens, "train", _sizes(dtype, tokens, 16, _HIDDEN, 2)
    for experts in (1, 4, 16, 64, 256):
        yield "experts", experts, "forward", _sizes(dtype, 4096, experts, _HIDDEN, 1)
    for top_k in (1, 2, 4, 8):
        yield "top_k", top_k, "forward", _sizes(dtype, 2048, 16, _HIDDEN, top_k)
    for hidden in (128, 512, 2048, 8192):
        yield "hidden", hidden, "forward", _sizes(dtype, 1024, 8, hidden, 2)


def _thread_counts() -> list[int]:
    """Return 1, 2, 4 ... up to the machine's cores, 2 in any case."""
    cores = max(2, os.cpu_count() or 1)
    return [2**power for power in range(cores.bit_length()) if 2**power <= cores]


def _along_rows(dtype: torch.dtype) -> Iterator[Workload]:
    for rows in (1, 4, 16, 64, 256, 1024):
        shape = gemm.Shape(f"E16_R{16 * rows}", 1024, 1024, [[rows] * 16])
        yield Workload(
            f"curve.rows_per_expert.{SHORT_NAMES[dtype]}.{shape.name}",
            dtype,
            partial(gemm.build, shape, dtype, train=False),
            brief=True,
            point=Point("rows_per_expert", rows, f"product {SHORT_NAMES[dtype]}"),
        )


def _workloads() -> list[Workload]:
    made = []
    for dtype in _DTYPES:
        for axis, x, kind, sizes in _points(dtype):
            build = forward_case if kind == "forward" else step_case
            point = Point(axis, x, f"{kind} {SHORT_NAMES[dtype]}")
            name = f"curve.{axis}.{kind}.{sizes}"
            made.append(Workload(name, dtype, partial(build, sizes), brief=True, point=point))
        made += _along_rows(dtype)
        for threads in _thread_counts():
            sizes = _sizes(dtype, 4096, 16, _HIDDEN, 2)
            point = Point("threads", threads, f"forward {SHORT_NAMES[dtype]}")
            name = f"curve.threads.forward.{sizes}.threads{threads}"
            case = partial(forward_case, sizes)
            made.append(Workload(name, dtype, case, brief=True, threads=threads, point=point))
    return made


WORKLOADS = _workloads()
