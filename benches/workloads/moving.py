"""Dispatch and combine: rows moved between tokens and experts, against torch's own indexing."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from tutel.functional import combine, dispatch

from benches.floors import FRESH_FROM, Work
from benches.workload import SHORT_NAMES, Case, Results, Side, Workload
from benches.workloads.routing import RandomRoute

_EXPERTS = 64


def _fresh(*sizes: int) -> int:
    return sum(size for size in sizes if size >= FRESH_FROM)


def _side(name: str, forward: Callable[[], Tensor], inputs: list[Tensor], grad: Tensor | None) -> Side:
    """Forward, or forward and backward where there is a gradient of the output."""

    def run() -> Results:
        if grad is None:
            with torch.no_grad():
                return (forward(),)
        output = forward()
        return output.detach(), *torch.autograd.grad([output], inputs, [grad])

    return Side(name, run)


def _dispatch(tokens: int, width: int, top_k: int, dtype: torch.dtype, train: bool) -> Case:
    route = RandomRoute.make(tokens, _EXPERTS, top_k)
    values = torch.randn(tokens, width).to(dtype).requires_grad_()
    grad = torch.randn(tokens * top_k, width).to(dtype) if train else None
    ours = _side("tutel", lambda: dispatch(values, route.rows.row_index, route.rows.row_choice), [values], grad)
    peer = _side("torch.index_select", lambda: torch.index_select(values, 0, route.token_of_row), [values], grad)
    token_bytes, row_bytes = (count * width * dtype.itemsize for count in (tokens, tokens * top_k))
    # Backward is the same move in the other direction.
    moved = (token_bytes + row_bytes) * (2 if train else 1)
    fresh = _fresh(row_bytes, token_bytes) if train else _fresh(row_bytes)
    return Case(ours, [peer], Work(dtype, moved=moved, fresh=fresh))


def _combine(tokens: int, width: int, top_k: int, dtype: torch.dtype, train: bool) -> Case:
    route = RandomRoute.make(tokens, _EXPERTS, top_k)
    rows = torch.randn(tokens * top_k, width).to(dtype).requires_grad_()
    weights = route.weights.clone().requires_grad_()
    grad = torch.randn(tokens, width).to(dtype) if train else None
    plan = route.rows

    def index_add() -> Tensor:
        weight = weights.flatten()[plan.row_choice] if train else route.weight_of_row
        output = rows.new_zeros(tokens, width)
        return output.index_add(0, route.token_of_row, rows * weight[:, None].to(dtype))

    def gather() -> Tensor:
        gathered = rows[plan.row_index.flatten()].view(tokens, top_k, width)
        return torch.bmm(weights[:, None].to(dtype), gathered).squeeze(1)

    inputs = [rows, weights]
    ours = _side("tutel", lambda: combine(rows, plan.row_index, plan.row_choice, weights), inputs, grad)
    peers = [_side("torch.index_add", index_add, inputs, grad), _side("torch index+bmm", gather, inputs, grad)]
    token_bytes, row_bytes = (count * width * dtype.itemsize for count in (tokens, tokens * top_k))
    # Backward writes the rows' gradient and reads rows and the output's gradient again for the weights'.
    moved = (token_bytes + row_bytes) * (2 if train else 1)
    fresh = _fresh(row_bytes, token_bytes) if train else _fresh(token_bytes)
    return Case(ours, peers, Work(dtype, read=row_bytes if train else 0, moved=moved, fresh=fresh))


def _workloads() -> list[Workload]:
    fp32, bf16 = torch.float32, torch.bfloat16
    sizes = [
        (8192, 8, fp32, False),
        (8192, 8, fp32, True),
        (8192, 8, bf16, False),
        # Outputs below 32 MiB live on memory that is warm: the kernels without the page faults.
        (1024, 2, fp32, False),
        (1024, 2, fp32, True),
    ]
    made = []
    for subject, build in (("dispatch", _dispatch), ("combine", _combine)):
        for tokens, top_k, dtype, train in sizes:
            kind = "train" if train else "forward"
            name = f"{subject}.{kind}.{SHORT_NAMES[dtype]}.T{tokens}_k{top_k}_D2048"
            made.append(Workload(name, dtype, partial(build, tokens, 2048, top_k, dtype, train)))
    return made


WORKLOADS = _workloads()
