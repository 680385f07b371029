"""A dispatcher for choices that somebody else made, with slots of their own.

Symbols: T tokens, D their width, E experts, K choices a token, C capacity (slots per expert).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from tutel.errors import FLOAT_DTYPES, check_bool, check_int, check_tensor, one_of
from tutel.functional import accumulator_dtype, combine, dispatch, padded_rows

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_INT32 = torch.iinfo(torch.int32)


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
        self.num_global_experts = size("num_global_experts", num_global_experts, at_least=1)
        self.capacity = size("capacity", capacity)
        self.model_dim = size("model_dim", model_dim)
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
        slots_per_expert = (0 if capacity is None else size("capacity", capacity)) or self.capacity
        ids = columns("indices_", indices_, INTEGERS, None)
        slots = columns("locations_", locations_, INTEGERS, ("indices_", ids))
        gates = columns("gates_", gates_, FLOAT_DTYPES, ("indices_", ids))
        row_index, row_choice = padded_rows(
            stack_int32(ids), stack_int32(slots), self.num_global_experts, slots_per_expert
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


def size(name: str, value: Any, *, at_least: int = 0) -> int:
    """Check a size."""
    if isinstance(value, torch.SymInt):  # traced by torch.compile: it has no value to check
        return cast(int, value)
    return check_int(name, value, at_least=at_least)


def columns(
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
    check_tensor(f"{source}[0]", first, dtypes=INTEGERS)
    for j, tensor in enumerate(tensors):
        check_tensor(f"{name}[{j}]", tensor, dtypes=dtypes, like=(f"{source}[0]", first))
        if tensor.numel() != first.numel():
            raise ValueError(
                f"{name}[{j}] must have as many elements as {source}[0] ({first.numel()}), got {tensor.numel()}"
            )
    return [tensor.reshape(-1) for tensor in tensors]


def stack_int32(columns: list[Tensor]) -> Tensor:
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
