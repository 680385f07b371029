"""Collectives, in their historic forms. W is the number of ranks of the group.

Two kinds, which differ in what autograd sees: those named ``simple_`` end the graph, the others are differentiable.
Among one rank most are the identity: the result shares the input's memory where it is not said to be new.

All ranks of the group must call the same function with tensors of the same shape and dtype, except where sizes are said
to differ. What they bring is compared first (on the CPU; see ``TUTEL_CHECK_RANKS``), and a difference, a rank that
fails or one that does not come is a :class:`~tutel.distributed.failure.RankError` on the others.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, cast, overload

import torch
from torch import Tensor
from torch.distributed import ReduceOp

from tutel import env
from tutel.distributed import differentiable, transport
from tutel.distributed.agreement import agree
from tutel.distributed.groups import Group, group_device, world_size
from tutel.errors import check_bool, check_int


def simple_broadcast(input: Tensor, src: int = 0, group: Group = None) -> Tensor:  # noqa: A002
    """Overwrite ``input`` with that of rank ``src`` of the group; return it."""
    ranks = _ranks("simple_broadcast", input, group)
    if check_int("src", src, at_least=0) >= ranks:
        raise ValueError(f"src must be below the number of ranks ({ranks}), got {src}")
    if ranks == 1:
        return input
    with torch.no_grad():
        return _in_place(input, lambda flat: transport.broadcast("simple_broadcast", flat, int(src), group))


def simple_all_reduce(
    input: Tensor,  # noqa: A002
    group: Group = None,
    op: Any = ReduceOp.SUM,
    inplace: bool = False,
) -> Tensor:
    """Reduce over the ranks, elementwise.

    Args:
        input: Of any shape.
        group: The ranks.
        op: A ``torch.distributed.ReduceOp``.
        inplace: Overwrite the input and return it.
    """
    ranks = _ranks("simple_all_reduce", input, group)
    _check_op(op)
    inplace = check_bool("inplace", inplace)
    if ranks == 1:
        return input if inplace else input.detach()

    def reduce(tensor: Tensor) -> Tensor:
        return transport.all_reduce("simple_all_reduce", tensor, group, op)

    with torch.no_grad():
        return _in_place(input, reduce) if inplace else reduce(differentiable.copy(input))


@overload
def simple_all_to_all(input: Tensor, group: Group = None, background: Literal[False] = False) -> Tensor: ...
@overload
def simple_all_to_all(
    input: Tensor, group: Group = None, *, background: Literal[True]
) -> tuple[Tensor, Callable[..., None]]: ...
def simple_all_to_all(
    input: Tensor,  # noqa: A002
    group: Group = None,
    background: bool = False,
) -> Tensor | tuple[Tensor, Callable[..., None]]:
    """Send the i-th of W equal parts of dimension 0 to rank i; the parts received are in the ranks' order.

    Args:
        input: [W * n, ...].
        group: The ranks.
        background: Return (output, wait) at once; the output may be used after ``wait()``.
    """
    ranks = _ranks("simple_all_to_all", input, group, divided=0)
    background = check_bool("background", background)
    output = input.detach().contiguous()
    if ranks == 1:
        return (output, _wait) if background else output
    flight = transport.Flight("simple_all_to_all", output, group)
    return (flight.output, lambda *_unused: _land(flight)) if background else flight.land()


def simple_split(input: Tensor, group: Group = None) -> Tensor:  # noqa: A002
    """Return this rank's one of W equal parts of dimension 0."""
    _ranks("simple_split", input, group, divided=0)
    return transport.own_part(input.detach(), group).contiguous()


def simple_reduce_scatter(input: Tensor, group: Group = None, op: Any = ReduceOp.SUM) -> Tensor:  # noqa: A002
    """Reduce over the ranks and return this rank's one of W equal parts of dimension 0."""
    ranks = _ranks("simple_reduce_scatter", input, group, divided=0)
    _check_op(op)
    parts = input.detach().contiguous()
    return parts if ranks == 1 else transport.reduce_scatter("simple_reduce_scatter", parts, group, op)


def simple_all_gather(input: Tensor, group: Group = None) -> Tensor:  # noqa: A002
    """Return the ranks' inputs, of equal shapes, joined along dimension 0; [W] for 0-d inputs."""
    ranks = _ranks("simple_all_gather", input, group)
    part = input.detach().contiguous()
    if ranks > 1:
        return transport.gather("simple_all_gather", part, group)
    return part.reshape(1) if part.dim() == 0 else part


@overload
def all_to_all(
    input: Tensor,
    input_dim: int,
    output_dim: int,
    group: Group = None,
    background: Literal[False] = False,
    use_2dh: bool = False,
) -> Tensor: ...
@overload
def all_to_all(
    input: Tensor,
    input_dim: int,
    output_dim: int,
    group: Group = None,
    *,
    background: Literal[True],
    use_2dh: bool = False,
) -> Callable[[], Tensor]: ...
def all_to_all(
    input: Tensor,  # noqa: A002
    input_dim: int,
    output_dim: int,
    group: Group = None,
    background: bool = False,
    use_2dh: bool = False,
) -> Tensor | Callable[[], Tensor]:
    """Exchange which dimension is divided among the ranks; differentiable.

    Rows [E, C, D] of one rank's tokens for all experts become [E / W, W * C, D], all ranks' rows for its own experts,
    by ``all_to_all(rows, 1, 0)``, and ``all_to_all(rows, 0, 1)`` brings them back.

    Args:
        input: With two dimensions or more.
        input_dim: The dimension that is divided among the ranks before, and joined after.
        output_dim: The dimension that is whole before, and divided after; W must divide it.
        group: The ranks.
        background: Return a function at once, which waits and returns the output.
        use_2dh: Exchange inside nodes first, then across; ``TUTEL_ALLTOALL_ALGO=2D`` asks for that too.
    """
    ranks = _ranks("all_to_all", input, group, dims=[input_dim], divided=output_dim)
    hierarchical = check_bool("use_2dh", use_2dh) or env.hierarchical_exchange()
    background = check_bool("background", background)
    if ranks == 1:
        return (lambda: input) if background else input
    joined, divided = input_dim % input.dim(), output_dim % input.dim()
    # [.., W * n, ..] -> [W * .., n, ..], by destination; what arrives is [W * .., n, ..] by source.
    parts = transport.unflatten(input, divided, ranks, input.shape[divided] // ranks).movedim(divided, 0)
    sizes = parts.shape

    def join(received: Tensor) -> Tensor:
        return received.reshape(sizes).movedim(0, joined).flatten(joined, joined + 1).contiguous()

    if not background:
        return join(differentiable.exchange(parts, "all_to_all", group, hierarchical=hierarchical))
    wait = differentiable.exchange_in_background(parts, "all_to_all", group, hierarchical=hierarchical)
    return lambda: join(wait())


def all_to_all_single(input: Tensor, group: Group = None) -> Tensor:  # noqa: A002
    """Send the i-th of W equal parts of dimension 0 to rank i; differentiable."""
    ranks = _ranks("all_to_all_single", input, group, divided=0)
    return (
        input
        if ranks == 1
        else differentiable.exchange(input, "all_to_all_single", group, hierarchical=env.hierarchical_exchange())
    )


def all_gather(input: Tensor, dim: int = 0, group: Group = None) -> Tensor:  # noqa: A002
    """Return the ranks' inputs joined along a dimension; its gradient is reduced and scattered."""
    ranks = _ranks("all_gather", input, group, dims=[dim])
    return input if ranks == 1 else _along(dim, input, lambda x: differentiable.gather(x, "all_gather", group))


def reduce_scatter(input: Tensor, dim: int = 0, group: Group = None) -> Tensor:  # noqa: A002
    """Sum over the ranks and return this rank's part of a dimension; its gradient is gathered."""
    ranks = _ranks("reduce_scatter", input, group, divided=dim)
    return (
        input if ranks == 1 else _along(dim, input, lambda x: differentiable.reduce_scatter(x, "reduce_scatter", group))
    )


def spatial_split(input: Tensor, dim: int = 0, group: Group = None) -> Tensor:  # noqa: A002
    """Return this rank's part of a dimension of an input that all ranks hold; its gradient is gathered."""
    ranks = _ranks("spatial_split", input, group, divided=dim)
    return input if ranks == 1 else _along(dim, input, lambda x: differentiable.own_part(x, "spatial_split", group))


def allreduce_forward(input: Tensor, group: Group = None) -> Tensor:  # noqa: A002
    """Sum over the ranks; the gradient passes as it is."""
    ranks = _ranks("allreduce_forward", input, group)
    return input if ranks == 1 else differentiable.sum_forward(input, "allreduce_forward", group)


def allreduce_backward(input: Tensor, group: Group = None) -> Tensor:  # noqa: A002
    """Pass the input as it is; the gradient is summed over the ranks."""
    ranks = _ranks("allreduce_backward", input, group)
    return input if ranks == 1 else differentiable.sum_backward(input, "allreduce_backward", group)


def zero_gather(input: Tensor, full_shape: Sequence[int] | None = None, group: Group = None) -> Tensor:  # noqa: A002
    """Join the ranks' parts of a tensor that :func:`zero_scatter` divided; differentiable.

    Args:
        input: This rank's part, of any shape; the parts of the ranks have equal sizes.
        full_shape: Shape of the whole, [W * n, ...] for parts [n, ...] by default. Padding at the end is cut off.
        group: The ranks.

    Returns:
        A tensor of shape full_shape.

    Raises:
        ValueError: If all parts together have fewer elements than full_shape.
    """
    ranks = _ranks("zero_gather", input, group)
    shape = torch.Size(_joined_shape(input, ranks) if full_shape is None else full_shape)
    if shape.numel() > ranks * input.numel():
        raise ValueError(
            f"full_shape {list(shape)} has {shape.numel()} elements, but the ranks' parts have {ranks * input.numel()}"
        )
    flat = input.reshape(-1)
    whole = flat if ranks == 1 else differentiable.gather(flat, "zero_gather", group)
    return whole[: shape.numel()].reshape(shape)


def zero_scatter(
    input: Tensor,  # noqa: A002
    scatter_fn: Callable[..., Tensor],
    group: Group = None,
) -> tuple[Tensor, torch.Size]:
    """Divide a tensor of any shape evenly among the ranks.

    Args:
        input: The whole; it is flattened, and padded with zeros to a multiple of W.
        scatter_fn: Called as f(flat, group=group), for example :func:`simple_split` or :func:`simple_reduce_scatter`.
        group: The ranks.

    Returns:
        (this rank's part [ceil(numel / W)], the shape of the whole, which :func:`zero_gather` takes).
    """
    ranks = _ranks("zero_scatter", input, group)
    flat = input.reshape(-1)
    missing = -len(flat) % ranks
    padded = torch.cat([flat, flat.new_zeros(missing)]) if missing else flat
    return scatter_fn(padded, group=group), input.shape


def batch_all_to_all_v(
    datas: Sequence[Tensor], partition_sizes: Sequence[int] | Tensor, group: Group = None
) -> tuple[list[Tensor], Tensor]:
    """Send parts of different sizes of several tensors to the ranks; each tensor is divided alike.

    Args:
        datas: Tensors, each taken as its elements in order.
        partition_sizes: [W] how many elements, from the start on, go to each rank.
        group: The ranks.

    Returns:
        (for each tensor the received elements; [W] int64, how many came from each rank). Among one rank a tensor that
        is sent whole keeps its shape.

    Raises:
        TypeError: If datas is no list of tensors.
        ValueError: If sizes are not W, negative, or more than there are.
    """
    tensors, ranks = _tensors("batch_all_to_all_v", datas, group)
    sizes = torch.as_tensor(partition_sizes, dtype=torch.int64, device=tensors[0].device)
    if sizes.shape != (ranks,):
        raise ValueError(f"partition_sizes must hold one size a rank ([{ranks}]), got shape {list(sizes.shape)}")
    sent = sizes.tolist()
    parts = [_first_elements(tensor, sent) for tensor in tensors]
    if ranks == 1:
        return parts, sizes
    # Of the tensors only their number and dtypes must agree.
    _agree_on_kinds("batch_all_to_all_v", tensors, group)
    incoming = transport.exchange_sizes("batch_all_to_all_v", sizes, group)
    received = incoming.tolist()
    flat = [part.reshape(-1) for part in parts]
    return [
        differentiable.exchange_ragged(part, "batch_all_to_all_v", sent, received, group) for part in flat
    ], incoming


def batch_all_gather_v(datas: Sequence[Tensor], group: Group = None) -> tuple[list[Tensor], Tensor]:
    """Join tensors whose sizes differ between the ranks; the tensors of one rank have equal sizes.

    Args:
        datas: Tensors, each taken as its elements in order.
        group: The ranks.

    Returns:
        (for each tensor the elements of all ranks, flat; [W] int64, how many each rank gave).

    Raises:
        TypeError: If datas is no list of tensors.
        ValueError: If this rank's tensors differ in size.
    """
    tensors, ranks = _tensors("batch_all_gather_v", datas, group)
    counts = {tensor.numel() for tensor in tensors}
    if len(counts) > 1:
        raise ValueError(f"datas must all have the same number of elements, got {sorted(counts)}")
    size = torch.tensor([tensors[0].numel()], dtype=torch.int64, device=tensors[0].device)
    flat = [tensor.reshape(-1) for tensor in tensors]
    if ranks == 1:
        return flat, size
    _agree_on_kinds("batch_all_gather_v", tensors, group)
    sizes = transport.exchange_sizes("batch_all_gather_v", size.expand(ranks).contiguous(), group)
    sent, received = [len(flat[0])] * ranks, sizes.tolist()
    # Each rank sends all of its elements to every rank: so nothing is padded to the longest.
    copies = [part.repeat(ranks) for part in flat]
    name = "batch_all_gather_v"
    return [differentiable.exchange_ragged(part, name, sent, received, group) for part in copies], sizes


def _ranks(what: str, value: object, group: Group, dims: Sequence[int] = (), divided: int | None = None) -> int:
    """Check a collective's input; return W, which must divide a dimension."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{what}: input must be a torch.Tensor, got {type(value).__name__}")
    for dim in dims if divided is None else (*dims, divided):
        if not -value.dim() <= check_int("a dimension", dim) < value.dim():
            raise ValueError(f"{what}: input has no dimension {dim}, its shape is {list(value.shape)}")
    ranks = world_size(group)
    if divided is not None and value.shape[divided] % ranks != 0:
        raise ValueError(
            f"{what}: the number of ranks ({ranks}) must divide dimension {divided} of input, "
            f"its shape is {list(value.shape)}"
        )
    return ranks


def _check_op(op: object) -> None:
    # ReduceOp.SUM and its like are of a type of their own, which is nested in ReduceOp.
    if not isinstance(op, ReduceOp | cast(type, ReduceOp.RedOpType)):
        raise TypeError(f"op must be a torch.distributed.ReduceOp, got {op!r}")


def _tensors(what: str, datas: object, group: Group) -> tuple[list[Tensor], int]:
    if not isinstance(datas, list | tuple) or not datas or not all(isinstance(data, Tensor) for data in datas):
        raise TypeError(f"{what}: datas must be a list of at least one torch.Tensor, got {type(datas).__name__}")
    return list(datas), world_size(group)


def _agree_on_kinds(what: str, tensors: list[Tensor], group: Group) -> None:
    for number, tensor in enumerate(tensors):
        empty = torch.empty(0, dtype=tensor.dtype, device=group_device(group))
        agree(what, empty, group, number, len(tensors))


def _first_elements(tensor: Tensor, sizes: list[int]) -> Tensor:
    if min(sizes) < 0 or sum(sizes) > tensor.numel():
        raise ValueError(
            f"partition_sizes must lie between 0 and, together, the number of elements ({tensor.numel()}), "
            f"got {sizes[0] if len(sizes) == 1 else sizes}"
        )
    return tensor if sum(sizes) == tensor.numel() else tensor.reshape(-1)[: sum(sizes)]


def _joined_shape(part: Tensor, ranks: int) -> list[int]:
    return list(part.shape) if ranks == 1 else transport.joined_shape(part.shape, ranks)


def _along(dim: int, tensor: Tensor, collective: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply a collective of dimension 0 to another dimension."""
    return collective(tensor.movedim(dim, 0)).movedim(0, dim).contiguous()


def _in_place(tensor: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply what overwrites a contiguous tensor to one that may not be."""
    if tensor.is_contiguous():
        act(tensor)
    else:
        tensor.copy_(act(differentiable.copy(tensor)))
    return tensor


def _land(flight: transport.Flight) -> None:
    flight.land()


def _wait(*_unused: object) -> None:
    """Wait for what has happened already."""
