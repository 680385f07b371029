"""The historic low-level surface: routing from scores, and a dispatcher for choices that somebody else made.

Translation only: the work is done by ``tutel.functional``. Names and argument names are those that programs use.

Symbols: T tokens, D their width, E experts, K choices a token, C capacity (slots per expert). The j-th of K tensors
holds each token's j-th choice: the expert's id, the slot within the expert (historically "location") or the weight
("gate"). Expert e owns rows ``e * C`` up to ``(e + 1) * C`` of what is dispatched.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from tutel.errors import FLOAT_DTYPES, check_bool, check_callable, check_int, check_tensor, one_of
from tutel.functional import (
    accumulator_dtype,
    assign_rows,
    combine,
    dispatch,
    padded_rows,
    prefix_count,
    select_experts,
)
from tutel.impls.losses import gshard_loss
from tutel.layer import MOELayer
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

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_INT32 = torch.iinfo(torch.int32)


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


@dataclass(frozen=True)
class _Placement:
    """Where choices stand in the padded rows, see :func:`tutel.functional.padded_rows`.

    Attributes:
        row_index: [T, K] int64, -1 where a choice is not routed.
        row_choice: [E * C] int64, its inverse.
        weights: [T, K], in the accumulator's dtype.
        shared: Whether several choices claim one row.
    """

    row_index: Tensor
    row_choice: Tensor
    weights: Tensor
    shared: bool

    def dispatch(self, tokens: Tensor, *, weigh: bool) -> Tensor:
        weights = self.weights if weigh else None
        if not self.shared:
            return dispatch(tokens, self.row_index, self.row_choice, weights)
        routed, token, row = self._routed()
        return _add_rows(tokens, token, row, self.row_choice.shape[0], self.weights[routed] if weigh else None)

    def combine(self, rows: Tensor, *, weigh: bool) -> Tensor:
        weights = self.weights if weigh else None
        if not self.shared:
            return combine(rows, self.row_index, self.row_choice, weights)
        routed, token, row = self._routed()
        return _add_rows(rows, row, token, self.row_index.shape[0], self.weights[routed] if weigh else None)

    def _routed(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return which choices are routed [T, K] bool, and the token and row of each of them."""
        routed = self.row_index >= 0
        return routed, routed.nonzero()[:, 0], self.row_index[routed]


def _add_rows(source: Tensor, from_row: Tensor, to_row: Tensor, length: int, weights: Tensor | None) -> Tensor:
    """Add rows of the source to rows of a result of that length; sums are made in the accumulator's dtype."""
    values = source.to(accumulator_dtype(source.dtype))[from_row]
    if weights is not None:
        values = values * weights.unsqueeze(1)
    return values.new_zeros((length, source.shape[1])).index_add(0, to_row, values).to(source.dtype)


class fast_dispatcher:  # noqa: N801  (the historic name)
    """Dispatch and combine for a plan that arrives with slots of its own; reusable while T and C change.

    A choice is not routed if its id is -1 or its slot is negative or not below C: it adds nothing to a row, a token or
    a gradient. Where several choices claim one slot, their tokens are added up there, as they always were: some gates
    leave masked tokens at slot 0 with weight 0.

    Args:
        num_global_experts: E.
        capacity: C, until :meth:`update` brings another.
        model_dim: D.
        dispatch_dtype: What :meth:`encode` and :meth:`decode` cast their argument to, compute in and return; half types
            are summed in fp32.

    Raises:
        TypeError: If an argument has the wrong type, or dispatch_dtype is no floating-point dtype of torch.
        ValueError: If a number is out of range.
    """

    def __init__(self, num_global_experts: int, capacity: int, model_dim: int, dispatch_dtype: torch.dtype) -> None:
        if dispatch_dtype not in FLOAT_DTYPES:
            raise TypeError(f"dispatch_dtype must be {one_of(FLOAT_DTYPES)}, got {dispatch_dtype!r}")
        self.num_global_experts = _size("num_global_experts", num_global_experts, at_least=1)
        self.capacity = _size("capacity", capacity)
        self.model_dim = _size("model_dim", model_dim)
        self.dtype = dispatch_dtype
        self.is_postscore = True
        self._placement: _Placement | None = None

    def update(
        self,
        indices_: Sequence[Tensor],
        locations_: Sequence[Tensor],
        gates_: Sequence[Tensor],
        capacity: int | None = None,
        is_postscore: bool = True,
    ) -> None:
        """Take the choices of the next tokens.

        Args:
            indices_: K tensors [T] of an integer dtype: experts, between 0 and E - 1, or -1 for none.
            locations_: K tensors [T] of an integer dtype: slots.
            gates_: K tensors [T], floating point (differentiable): weights.
            capacity: C; None and 0 keep the last one (programs pass 0 for "as it was").
            is_postscore: Whether weights multiply in :meth:`decode`, else in :meth:`encode`.

        Raises:
            TypeError: If an argument has the wrong type or dtype.
            ValueError: If the lists or tensors differ in length or device, or the capacity is negative.
            RuntimeError: If an id is out of range.
        """
        is_postscore = check_bool("is_postscore", is_postscore)
        slots_per_expert = (0 if capacity is None else _size("capacity", capacity)) or self.capacity
        ids = _columns("indices_", indices_, _INTEGERS, None)
        slots = _columns("locations_", locations_, _INTEGERS, ("indices_", ids))
        gates = _columns("gates_", gates_, FLOAT_DTYPES, ("indices_", ids))
        row_index, row_choice = padded_rows(
            _stack_int32(ids), _stack_int32(slots), self.num_global_experts, slots_per_expert
        )
        wide = accumulator_dtype(self.dtype)
        weights = torch.stack([gate.to(wide) for gate in gates], 1)
        self._placement = _Placement(row_index, row_choice, weights, _rows_are_shared(row_index, row_choice))
        self.capacity, self.is_postscore = slots_per_expert, is_postscore

    def encode(self, x: Tensor) -> Tensor:
        """Bring tokens to their rows.

        Args:
            x: [T, D] (or other leading dimensions, T in all), floating point (differentiable).

        Returns:
            [E * C, D] in dispatch_dtype, contiguous, zero where a slot is empty.

        Raises:
            TypeError: If x is no floating-point tensor.
            ValueError: If its shape or device is wrong.
            RuntimeError: If :meth:`update` was never called.
        """
        plan = self._updated()
        tokens = _matrix("x", x, plan.row_index.shape[0], "T (the length of the lists' tensors)", plan)
        if tokens.shape[1] != self.model_dim:
            raise ValueError(f"x must have the width model_dim={self.model_dim}, got shape {list(x.shape)}")
        return plan.dispatch(tokens.to(self.dtype), weigh=not self.is_postscore)

    def decode(self, y: Tensor) -> Tensor:
        """Bring the experts' rows back to their tokens.

        Args:
            y: [E * C, D] or [E, C, D], floating point (differentiable); D is the experts' own here.

        Returns:
            [T, D] in dispatch_dtype.

        Raises:
            TypeError, ValueError, RuntimeError: As :meth:`encode`.
        """
        plan = self._updated()
        rows = _matrix("y", y, self.num_global_experts * self.capacity, "E * C", plan)
        return plan.combine(rows.to(self.dtype), weigh=self.is_postscore)

    def _updated(self) -> _Placement:
        if self._placement is None:
            raise RuntimeError("fast_dispatcher has no choices yet: call update(...) before encode and decode")
        return self._placement


TutelMoeFastDispatcher = fast_dispatcher


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
        NotImplementedError: If the ranks of a larger group would have to agree on C.
    """
    check_tensor("scores", scores, shape=(None, None))
    if loss_fn is not None:
        check_callable("loss_fn", loss_fn)
    num_tokens, num_experts = scores.shape
    if num_experts == 0:
        raise ValueError(f"scores must have a column for each of E >= 1 experts, got shape {list(scores.shape)}")
    top_k = min(_size("top_k", top_k, at_least=1), num_experts)
    multiple = _size("alignment", alignment, at_least=1)
    inequivalent_tokens = check_bool("inequivalent_tokens", inequivalent_tokens)
    prioritized = check_bool("batch_prioritized_routing", batch_prioritized_routing)

    chosen = select_experts(scores, top_k, softmax=False, normalize=check_bool("normalize_gate", normalize_gate))
    rows = assign_rows(chosen.ids, num_experts, priority=chosen.top_scores if prioritized else None)
    counted = _sync(group).max(num_tokens) if inequivalent_tokens else num_tokens
    limit = drop_threshold(capacity_factor, counted, num_experts, top_k)
    if limit is None or capacity_factor < 0:
        needed = _sync(group).max(int(rows.tokens_per_expert.max()))
        limit = needed if limit is None else min(needed, limit)
    capacity = -(-limit // multiple) * multiple

    topk_ids = chosen.ids.to(torch.int64)
    counts = rows.tokens_per_expert
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
    check_tensor("critial_data[5] (counts)", counts, dtypes=_INTEGERS)
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
    ids = _columns("critial_data[1] (ids)", indices, _INTEGERS, None)
    slots = _columns("critial_data[2] (slots)", locations, _INTEGERS, ("critial_data[1] (ids)", ids))
    _, choice = padded_rows(_stack_int32(ids), _stack_int32(slots), num_experts, capacity)
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


def _sync(group: Any) -> Sync:
    """Return the agreement between a group's ranks; asking for the number of experts refuses more than one rank."""
    MOELayer.global_expert_count(1, group)
    return LocalSync()


def _size(name: str, value: Any, *, at_least: int = 0) -> int:
    if isinstance(value, torch.SymInt):  # traced by torch.compile: it has no value to check
        return cast(int, value)
    return check_int(name, value, at_least=at_least)


def _columns(
    name: str, tensors: Any, dtypes: Sequence[torch.dtype], like: tuple[str, list[Tensor]] | None
) -> list[Tensor]:
    """Check a list of K tensors of T elements each and flatten them; K and T must be those of another list."""
    if not isinstance(tensors, tuple | list):
        raise TypeError(f"{name} must be a list of K tensors, got {type(tensors).__name__}")
    if not tensors:
        raise ValueError(f"{name} must have at least one tensor (K >= 1), got none")
    if like is not None and len(tensors) != len(like[1]):
        raise ValueError(f"{name} must have as many tensors as {like[0]} ({len(like[1])}), got {len(tensors)}")
    source, first = (name, tensors[0]) if like is None else (like[0], like[1][0])
    check_tensor(f"{source}[0]", first, dtypes=_INTEGERS)
    for j, tensor in enumerate(tensors):
        check_tensor(f"{name}[{j}]", tensor, dtypes=dtypes, like=(f"{source}[0]", first))
        if tensor.numel() != first.numel():
            raise ValueError(
                f"{name}[{j}] must have as many elements as {source}[0] ({first.numel()}), got {tensor.numel()}"
            )
    return [tensor.reshape(-1) for tensor in tensors]


def _stack_int32(columns: list[Tensor]) -> Tensor:
    """Make [T, K] int32 of K integer tensors; a value beyond int32 stays beyond every id and capacity."""
    return torch.stack(
        [(c.clamp(_INT32.min, _INT32.max) if c.dtype == torch.int64 else c).to(torch.int32) for c in columns], 1
    )


def _rows_are_shared(row_index: Tensor, row_choice: Tensor) -> bool:
    # The compiler cannot trace a question about values; compiled, the last of the choices that claim a row gets it.
    if torch.compiler.is_compiling():
        return False
    return bool(torch.count_nonzero(row_index >= 0) != torch.count_nonzero(row_choice >= 0))


def _matrix(name: str, value: Tensor, rows: int, meaning: str, plan: _Placement) -> Tensor:
    """Check a tensor of rows and flatten its leading dimensions."""
    check_tensor(name, value, like=("the choices", plan.row_index))
    if value.dim() < 2 or value.shape[:-1].numel() != rows:
        raise ValueError(f"{name} must have shape [{meaning} = {rows}, D], got {list(value.shape)}")
    return value.reshape(rows, value.shape[-1])
