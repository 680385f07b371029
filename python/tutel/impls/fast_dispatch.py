"""The historic low-level surface: routing from scores, and a dispatcher for choices that somebody else made.

Translation only: the work is done by ``tutel.functional``. Names and argument names are those that programs use.

Symbols: T tokens, D their width, E experts, K choices a token, C capacity (slots per expert). The j-th of K tensors
holds each token's j-th choice: the expert's id, the slot within the expert (historically "location") or the weight
("gate"). Expert e owns rows ``e * C`` up to ``(e + 1) * C`` of what is dispatched.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tutel.distributed.groups import world_size
from tutel.distributed.handshake import GroupSync
from tutel.errors import check_bool, check_callable, check_tensor
from tutel.functional import (
    assign_rows,
    padded_rows,
    prefix_count,
    select_experts,
)
from tutel.impls.dispatcher import INTEGERS, columns, fast_dispatcher, size, stack_int32
from tutel.impls.losses import gshard_loss
from tutel.route import drop_threshold
from tutel.sync import LocalSync, Sync

__all__ = [
    "TutelMoeFastDispatcher",
    "extract_critical",
    "fast_cumsum_sub_one",
    "fast_decode",
    "fast_dispatcher",
    "fast_encode",
    "get_dispatch_count",
    "get_reversed_sample_ids",
    "get_topk_selection",
]

TutelMoeFastDispatcher = fast_dispatcher


def fast_cumsum_sub_one(mask: Tensor, dim: int = 0) -> Tensor:
    """Return the cumulative sum of a mask, minus 1: the slot of each choice, where the mask is 1.

    Args:
        mask: [rows, columns] of any real or bool dtype.
        dim: 0 (down the columns) or 1 (along the rows).

    Returns:
        [rows, columns] int32 on a GPU, on the CPU the dtype of ``torch.cumsum``.

    Raises:
        TypeError, ValueError: As :func:`tutel.functional.prefix_count`.
    """
    counts = prefix_count(mask, dim)
    return counts.to(torch.int32) if counts.is_cuda else counts


def extract_critical(
    scores: Tensor,
    top_k: int,
    loss_fn: Callable[[Tensor, Tensor], Any] | None = gshard_loss,
    capacity_factor: float = 1.0,
    batch_prioritized_routing: bool = False,
    normalize_gate: bool = True,
    alignment: int = 1,
    group: Any = None,
    inequivalent_tokens: bool = False,
) -> tuple[tuple[int, list[Tensor], list[Tensor], list[Tensor], int, Tensor], Any]:
    """Choose the K experts with the largest scores of each token; also called ``tutel.moe.top_k_routing``.

    Slots are given to all first choices before all second ones, then in the order of the tokens, or of their largest
    scores when prioritised. The capacity follows :func:`tutel.route.drop_threshold`; with a factor f <= 0 it is at
    most what the fullest expert of any rank needs. Then it is rounded up to the alignment, and slots below that are
    kept.

    Args:
        scores: [T, E], floating point (differentiable), already normalised.
        top_k: K, at least 1; limited to E.
        loss_fn: Called with scores and ids [T, K] int64, gives the auxiliary loss; None for none.
        capacity_factor: f.
        batch_prioritized_routing: Serve tokens in descending order of their largest score.
        normalize_gate: Divide a token's weights by their sum, for K > 1.
        alignment: What C is a multiple of.
        group: The ranks that agree on C; None means all.
        inequivalent_tokens: Ranks may hold different T; C then counts the largest.

    Returns:
        The plan (E, ids, slots, weights, C, counts) and the loss, None without loss_fn. Ids and slots are K tensors [T]
        int32; weights are K tensors [T] fp32 (fp64 for fp64), differentiable; counts [E] int64 are the choices of each
        expert, dropped ones included, with the ids [T, K] int64 as attribute ``topk_ids``.

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If a shape or number is out of range.
        RankError: If ranks have to agree on C and one fails, or does not come.
    """
    check_tensor("scores", scores, shape=(None, None))
    if loss_fn is not None:
        check_callable("loss_fn", loss_fn)
    num_tokens, num_experts = scores.shape
    if num_experts == 0:
        raise ValueError(f"scores must have a column for each of E >= 1 experts, got shape {list(scores.shape)}")
    top_k = min(size("top_k", top_k, at_least=1), num_experts)
    multiple = size("alignment", alignment, at_least=1)
    inequivalent_tokens = check_bool("inequivalent_tokens", inequivalent_tokens)
    prioritized = check_bool("batch_prioritized_routing", batch_prioritized_routing)

    chosen = select_experts(scores, top_k, softmax=False, normalize=check_bool("normalize_gate", normalize_gate))
    rows = assign_rows(chosen.ids, num_experts, priority=chosen.top_scores if prioritized else None)
    counted = _sync(group, scores.device).max(num_tokens) if inequivalent_tokens else num_tokens
    limit = drop_threshold(capacity_factor, counted, num_experts, top_k)
    if limit is None or capacity_factor < 0:
        needed = _sync(group, scores.device).max(int(rows.tokens_per_expert.max()))
        limit = needed if limit is None else min(needed, limit)
    capacity = -(-limit // multiple) * multiple

    topk_ids = chosen.ids.to(torch.int64)
    counts = rows.tokens_per_expert
    if not torch.compiler.is_compiling():  # torch 2.10 cannot trace it; get_topk_selection stacks the ids without it
        counts.topk_ids = topk_ids  # type: ignore[attr-defined]
    ids, slots, weights = (
        [column.contiguous() for column in choices.unbind(1)] for choices in (chosen.ids, rows.slots, chosen.weights)
    )
    loss = None if loss_fn is None else loss_fn(scores, topk_ids)
    return (num_experts, ids, slots, weights, capacity, counts), loss


def fast_encode(data: Tensor, critial_data: Sequence[Any], is_postscore: bool = True) -> Tensor:
    """Bring tokens [T, D] to padded rows [E, C, D] in their own dtype, by a plan of :func:`extract_critical`.

    Args:
        data: [T, D] (or other leading dimensions, T in all), floating point (differentiable).
        critial_data: The plan, (E, ids, slots, weights, C, ...).
        is_postscore: Whether weights multiply in :func:`fast_decode`, else here.

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If shapes or devices do not agree.
        RuntimeError: If an id is out of range.
    """
    rows = _planned_dispatcher(data, critial_data, is_postscore)
    return rows.encode(data).view(rows.num_global_experts, rows.capacity, data.shape[-1])


def fast_decode(data: Tensor, critial_data: Sequence[Any], is_postscore: bool = True) -> Tensor:
    """Bring the experts' rows, [E, C, D] or [E * C, D], back to tokens [T, D]; otherwise as :func:`fast_encode`."""
    return _planned_dispatcher(data, critial_data, is_postscore).decode(data)


def get_dispatch_count(critial_data: Sequence[Any]) -> Tensor:
    """Return [E] int64, the choices of each expert of a plan, dropped ones included."""
    counts = _plan(critial_data, length=6)[5]
    check_tensor("critial_data[5] (counts)", counts, dtypes=INTEGERS)
    assert isinstance(counts, Tensor)
    return counts


def get_topk_selection(critial_data: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """Return the ids [T, K] int64 of a plan, in descending order of scores, and :func:`get_dispatch_count`."""
    counts = get_dispatch_count(critial_data)
    # Copies of the counts (another device, a collective's result) have lost the attribute.
    ids = getattr(counts, "topk_ids", None)
    return torch.stack(list(critial_data[1]), 1).to(torch.int64) if ids is None else ids, counts


def get_reversed_sample_ids(critial_data: Sequence[Any], return_id_type: str = "sample_id") -> Tensor:
    """Return who stands in each slot of a plan.

    Args:
        critial_data: The plan, (E, ids, slots, weights, C, ...).
        return_id_type: 'sample_id' for the token, 0 up to T - 1; 'top_id' for which of the token's choices it is, 0 up
            to K - 1.

    Returns:
        [E, C] int32, -1 where the slot is empty.

    Raises:
        TypeError: If the plan's parts have the wrong type or dtype.
        ValueError: If they do not agree, or return_id_type is none of the two.
        RuntimeError: If an id is out of range.
    """
    if return_id_type not in ("sample_id", "top_id"):
        raise ValueError(f"return_id_type must be 'sample_id' or 'top_id', got {return_id_type!r}")
    num_experts, indices, locations, _, capacity, *_ = _plan(critial_data)
    ids = columns("critial_data[1] (ids)", indices, INTEGERS, None)
    slots = columns("critial_data[2] (slots)", locations, INTEGERS, ("critial_data[1] (ids)", ids))
    _, choice = padded_rows(stack_int32(ids), stack_int32(slots), num_experts, capacity)
    of_choice = choice // len(ids) if return_id_type == "sample_id" else choice % len(ids)
    return torch.where(choice < 0, -1, of_choice).to(torch.int32).view(num_experts, capacity)


def _planned_dispatcher(data: Tensor, critial_data: Sequence[Any], is_postscore: bool) -> fast_dispatcher:
    check_tensor("data", data)
    num_experts, ids, slots, weights, capacity, *_ = _plan(critial_data)
    dispatcher = fast_dispatcher(num_experts, capacity, data.shape[-1] if data.dim() else 0, data.dtype)
    dispatcher.update(ids, slots, weights, is_postscore=is_postscore)
    return dispatcher


def _plan(critial_data: Sequence[Any], length: int = 5) -> Sequence[Any]:
    """Check a plan's outer form; programs that make their own leave out what stands behind C."""
    if not isinstance(critial_data, tuple | list):
        raise TypeError(f"critial_data must be a tuple or list, got {type(critial_data).__name__}")
    if len(critial_data) < length:
        raise ValueError(
            f"critial_data must be (E, ids, slots, weights, C, counts), at least its first {length} parts, "
            f"got {len(critial_data)} parts"
        )
    return critial_data


def _sync(group: Any, device: torch.device) -> Sync:
    """Return the agreement between a group's ranks."""
    return LocalSync() if world_size(group) == 1 else GroupSync(group, device)
