"""The calls of torch.distributed: contiguous tensors, equal on all ranks in shape, divided along dimension 0.

Each compares what the ranks bring (see :func:`agree`), and runs in a stage that names it. Nothing here is
differentiable. Symbols: W ranks of the group.

Sums of half types are made in fp32 and rounded once. What is only moved may have any dtype: backends know few of them,
and others travel as bytes.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed import ReduceOp

from tutel.distributed.agreement import agree
from tutel.distributed.failure import stage
from tutel.distributed.groups import Group, divide, group_device, node_size, world_rank, world_size

#: Types that every backend moves.
_MOVED = (
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.int8,
    torch.uint8,
)
#: Types whose sums are made in fp32.
HALF = (torch.bfloat16, torch.float16)

_OPERATIONS = (ReduceOp.SUM, ReduceOp.AVG, ReduceOp.PRODUCT, ReduceOp.MIN, ReduceOp.MAX, ReduceOp.BAND, ReduceOp.BOR)


def as_moved(tensor: Tensor) -> Tensor:
    """Return a contiguous tensor's memory in a dtype that every backend moves; 0-d becomes [1]."""
    flat = tensor.reshape(1) if tensor.dim() == 0 else tensor
    return flat if flat.dtype in _MOVED else flat.view(torch.uint8)


class Flight:
    """An exchange of equal parts under way: the i-th of W parts of dimension 0 goes to rank i.

    Args:
        name: The stage.
        parts: [W * n, ...], contiguous.
        group: The ranks.
        hierarchical: Inside nodes of L ranks first, then across: a rank sends (L - 1) + (W / L - 1) messages instead of
            W - 1, and twice the bytes.

    Attributes:
        output: What is received, as the parts are; it is there after :meth:`land`.
    """

    def __init__(self, name: str, parts: Tensor, group: Group, *, hierarchical: bool = False) -> None:
        self._stage = stage(name, group, parts)
        agree(name, parts, group)
        self.output = torch.empty_like(parts)
        ranks, local = world_size(group), node_size(group) if hierarchical else 1
        self._across: Callable[[], None] | None = None
        if local in (1, ranks):
            self._work = self._send(parts, self.output, group)
            return
        inside, across = divide(local, group)
        by_place = _transposed(parts, ranks // local, local)
        arrived = torch.empty_like(by_place)
        self._work = self._send(by_place, arrived, inside)

        def second() -> None:
            self._work = self._send(_transposed(arrived, local, ranks // local), self.output, across)
            self._work.wait()

        self._across = second

    def _send(self, source: Tensor, target: Tensor, group: Group) -> Any:
        self._source = source  # which must live as long as it is read
        with self._stage:
            return distributed.all_to_all_single(as_moved(target), as_moved(source), group=group, async_op=True)

    def land(self) -> Tensor:
        """Wait, and return the output."""
        if self._work is not None:
            with self._stage:
                self._work.wait()
                if self._across is not None:
                    self._across()
            self._work = self._across = self._source = None  # type: ignore[assignment]
        return self.output


def exchange(name: str, parts: Tensor, group: Group, *, hierarchical: bool = False) -> Tensor:
    """Send the i-th of W equal parts of dimension 0 to rank i; see :class:`Flight`."""
    return Flight(name, parts, group, hierarchical=hierarchical).land()


def exchange_sizes(name: str, sizes: Tensor, group: Group) -> Tensor:
    """Tell each rank one of W numbers [W], of int64 on any device; return what the others tell this rank."""
    device = group_device(group)
    return exchange(name, sizes.to(device), group).to(sizes.device)


def exchange_ragged(name: str, rows: Tensor, sent: Sequence[int], received: Sequence[int], group: Group) -> Tensor:
    """Send ``sent[i]`` rows of dimension 0 to rank i, and receive ``received[i]`` of it, as both know already."""
    output = rows.new_empty(sum(received), *rows.shape[1:])
    # A row's bytes must not become rows.
    source, target = (as_moved(each.unsqueeze(1) if each.dim() == 1 else each) for each in (rows, output))
    with stage(name, group, rows):
        distributed.all_to_all_single(target, source, list(received), list(sent), group=group)
    return output


def gather(name: str, part: Tensor, group: Group) -> Tensor:
    """Return the ranks' parts [n, ...] joined along dimension 0; [W] of 0-d parts."""
    agree(name, part, group)
    output = part.new_empty(joined_shape(part.shape, world_size(group)))
    with stage(name, group, part):
        distributed.all_gather_into_tensor(as_moved(output), as_moved(part), group=group)
    return output


def all_reduce(name: str, tensor: Tensor, group: Group, op: Any = ReduceOp.SUM) -> Tensor:
    """Reduce a contiguous tensor in place, elementwise, and return it."""
    agree(name, tensor, group, _number(op))
    with stage(name, group, tensor):
        if tensor.dtype in HALF and op in (ReduceOp.SUM, ReduceOp.AVG):
            wide = tensor.float()
            distributed.all_reduce(wide, op=op, group=group)
            return tensor.copy_(wide)
        distributed.all_reduce(tensor, op=op, group=group)
    return tensor


def reduce_scatter(name: str, parts: Tensor, group: Group, op: Any = ReduceOp.SUM) -> Tensor:
    """Reduce [W * n, ...] over the ranks, and return this rank's part [n, ...]."""
    ranks = world_size(group)
    if group_device(group).type == "cpu" and op in (ReduceOp.SUM, ReduceOp.AVG) and parts.dtype.is_floating_point:
        # Gloo would reduce everything on every rank. This sends half as much, and adds in the order of the ranks.
        received = unflatten(exchange(name, parts, group), 0, ranks, len(parts) // ranks)
        wide = torch.float32 if parts.dtype in HALF else parts.dtype
        total: Tensor = received.sum(0, dtype=wide)
        return (total / ranks if op == ReduceOp.AVG else total).to(parts.dtype)
    agree(name, parts, group, _number(op))
    # NCCL rounds a half type at each rank that a sum passes.
    summed = parts.float() if parts.dtype in HALF and op in (ReduceOp.SUM, ReduceOp.AVG) else parts
    output = summed.new_empty(len(parts) // ranks, *parts.shape[1:])
    with stage(name, group, parts):
        distributed.reduce_scatter_tensor(output, summed, op=op, group=group)
    return output.to(parts.dtype)


def broadcast(name: str, tensor: Tensor, source: int, group: Group) -> Tensor:
    """Overwrite a contiguous tensor with that of a rank of the group, and return it."""
    agree(name, tensor, group, source)
    origin = source if group is None else distributed.get_global_rank(group, source)
    with stage(name, group, tensor):
        distributed.broadcast(as_moved(tensor), origin, group=group)
    return tensor


def own_part(parts: Tensor, group: Group) -> Tensor:
    """Return this rank's of W equal parts of dimension 0, as a view."""
    size = len(parts) // world_size(group)
    return parts.narrow(0, world_rank(group) * size, size)


def unflatten(tensor: Tensor, dim: int, *sizes: int) -> Tensor:
    """Divide a dimension into several."""
    shape = tensor.shape
    return tensor.reshape(*shape[:dim], *sizes, *shape[dim + 1 :])


def joined_shape(shape: torch.Size, ranks: int) -> list[int]:
    """Return the shape of W parts joined along dimension 0."""
    return [ranks * shape[0], *shape[1:]] if shape else [ranks]


def _transposed(parts: Tensor, outer: int, inner: int) -> Tensor:
    """Bring parts [outer * inner * n, ...] into the order of inner, then outer."""
    each = len(parts) // (outer * inner)
    return unflatten(parts, 0, outer, inner, each).transpose(0, 1).flatten(0, 2).contiguous()


def _number(op: Any) -> int:
    """Return an operation's number, which is the same on every rank; -1 for one that is made of values."""
    return next((number for number, known in enumerate(_OPERATIONS) if op == known), -1)
