"""Routing: logits to experts, weights and rows, against softmax, topk and what people put behind them."""

import torch
from torch import Tensor
from torch.nn import functional as F
from tutel.functional import assign_rows, select_experts

from benches.floors import Work
from benches.workload import Case, Results, Side, Workload


def _choose(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    scores = F.softmax(logits, dim=1)
    weights, ids = torch.topk(scores, top_k, dim=1)
    return ids, weights / weights.sum(dim=1, keepdim=True), scores.sum(dim=0)


def _one_hot_slots(ids: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Slots and counts as GShard's descendants make them: a running sum of one-hot masks, choice by choice."""
    slots, counts = [], ids.new_zeros(experts)
    for chosen in ids.unbind(dim=1):
        mask = F.one_hot(chosen, experts)
        slots.append((torch.cumsum(mask, dim=0) - 1 + counts).gather(1, chosen[:, None]))
        counts = counts + mask.sum(dim=0)
    return torch.cat(slots, dim=1), counts


def _sorted_rows(ids: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Rows and counts as dropless implementations make them: a stable sort of the choices."""
    tokens, top_k = ids.shape
    order = torch.argsort(ids.T.flatten(), stable=True)
    return order % tokens * top_k + order // tokens, torch.bincount(ids.flatten(), minlength=experts)


def _forward(tokens: int, experts: int, top_k: int) -> Case:
    logits = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(0))

    def ours() -> Results:
        chosen = select_experts(logits, top_k)
        rows = assign_rows(chosen.ids, experts)
        return chosen.ids, chosen.weights, chosen.score_sums, rows.tokens_per_expert, rows.slots, rows.row_choice

    # Probes add what the other peer computes: all are compared in everything, and timed in what they do.
    def one_hot() -> Results:
        ids, weights, sums = _choose(logits, top_k)
        slots, counts = _one_hot_slots(ids, experts)
        return ids, weights, sums, counts, slots

    def by_sort() -> Results:
        ids, weights, sums = _choose(logits, top_k)
        rows, counts = _sorted_rows(ids, experts)
        return ids, weights, sums, counts, rows

    def probe_one_hot() -> Results:
        return *one_hot(), by_sort()[-1]

    def probe_by_sort() -> Results:
        ids, weights, sums, counts, rows = by_sort()
        return ids, weights, sums, counts, one_hot()[-1], rows

    peers = [
        Side("torch softmax+topk+cumsum(one_hot)", one_hot, probe_one_hot),
        Side("torch softmax+topk+argsort", by_sort, probe_by_sort),
    ]
    # ids, weights and slots in 4 bytes, both row maps in 8.
    written = tokens * top_k * (3 * 4 + 2 * 8)
    return Case(Side("tutel", ours), peers, Work(torch.float32, read=tokens * experts * 4, moved=written))


def _backward(tokens: int, experts: int, top_k: int) -> Case:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(tokens, experts, generator=generator, requires_grad=True)
    grad_weights = torch.randn(tokens, top_k, generator=generator)
    grad_sums = torch.randn(experts, generator=generator)

    def ours() -> Results:
        chosen = select_experts(logits, top_k)
        return torch.autograd.grad([chosen.weights, chosen.score_sums], [logits], [grad_weights, grad_sums])

    def peer() -> Results:
        _, weights, sums = _choose(logits, top_k)
        return torch.autograd.grad([weights, sums], [logits], [grad_weights, grad_sums])

    logits_bytes = tokens * experts * 4
    work = Work(torch.float32, read=logits_bytes, moved=2 * logits_bytes)
    return Case(Side("tutel", ours), [Side("torch softmax+topk", peer)], work)


def _workloads() -> list[Workload]:
    made = []
    for experts in (64, 256):
        name = f"E{experts}_k8_T8192"
        made.append(Workload(f"route.forward.{name}", torch.float32, lambda e=experts: _forward(8192, e, 8)))  # type: ignore[misc]
        made.append(Workload(f"route.train.{name}", torch.float32, lambda e=experts: _backward(8192, e, 8)))  # type: ignore[misc]
    # One thread: the aim is set for it.
    made.append(
        Workload("route.forward.E256_k8_T8192.threads1", torch.float32, lambda: _forward(8192, 256, 8), threads=1)
    )
    return made


WORKLOADS = _workloads()
