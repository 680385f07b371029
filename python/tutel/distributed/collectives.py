"""Collectives, in their historic forms. W is the number of ranks of the group, at present 1.

Two kinds, which differ in what autograd sees: those named ``simple_`` end the graph, the others are differentiable.
Among one rank most are the identity: the result shares the input's memory where it is not said to be new.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, cast, overload

import torch
from torch import Tensor
from torch.distributed import ReduceOp

from tutel.distributed.groups import Group, require_one_rank
from tutel.errors import check_bool, check_int


def simple_broadcast(input: Tensor, src: int = 0, group: Group = None) -> Tensor:  # noqa: A002
    """Overwrite ``input`` with that of rank ``src`` of the group; return it."""
    _check("simple_broadcast", input, group)
    if check_int("src", src, at_least=0) > 0:
        raise ValueError(f"src must be below the number of ranks (1), got {src}")
    return input


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
    _check("simple_all_reduce", input, group)
    _check_op(op)
    return input if check_bool("inplace", inplace) else input.detach()


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
    _check("simple_all_to_all", input, group, dims=[0])
    output = input.detach().contiguous()
    return (output, _wait) if check_bool("background", background) else output


def simple_split(input: Tensor, group: Group = None) -> Tensor:  # noqa: A002
    """Return this rank's one of W equal parts of dimension 0."""
    _check("simple_split", input, group, dims=[0])
    return input.detach().contiguous()


def simple_reduce_scatter(input: Tensor, group: Group = None, op: Any = ReduceOp.SUM) -> Tensor:  # noqa: A002
    """Reduce over the ranks and return this rank's one of W equal parts of dimension 0."""
    _check("simple_reduce_scatter", input, group, dims=[0])
    _check_op(op)
    return input.detach().contiguous()


def simple_all_gather(input: Tensor, group: Group = None) -> Tensor:  # noqa: A002
    """Return the ranks' inputs, of equal shapes, joined along dimension 0; [W] for 0-d inputs."""
    _check("simple_all_gather", input, group)
    output = input.detach().contiguous()
    return output.reshape(1) if output.dim() == 0 else output


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
        use_2dh: Exchange inside nodes first, then across.
    """
    _check("all_to_all", input, group, dims=[input_dim, output_dim])
    check_bool("use_2dh", use_2dh)
    return (lambda: input) if check_bool("background", background) else input


def all_to_all_single(input: Tensor, group: Group = None) -> Tensor:  # noqa: A002
    """Send the i-th of W equal parts of dimension 0 to rank i; differentiable."""
    _check("all_to_all_single", input, group, dims=[0])
    return input


def all_gather(input: Tensor, dim: int = 0, group: Group = None) -> Tensor:  # noqa: A002
    """Return the ranks' inputs joined along a dimension; its gradient is reduced and scattered."""
    _check("all_gather", input, group, dims=[dim])
    return input


def reduce_scatter(input: Tensor, dim: int = 0, group: Group = None) -> Tensor:  # noqa: A002
    """Sum over the ranks and return this rank's part of a dimension; its gradient is gathered."""
    _check("reduce_scatter", input, group, dims=[dim])
    return input


def spatial_split(input: Tensor, dim: int = 0, group: Group = None) -> Tensor:  # noqa: A002
    """Return this rank's part of a dimension of an input that all ranks hold; its gradient is gathered."""
    _check("spatial_split", input, group, dims=[dim])
    return input


def allreduce_forward(input: Tensor, group: Group = None) -> Tensor:  # noqa: A002
    """Sum over the ranks; the gradient passes as it is."""
    _check("allreduce_forward", input, group)
    return input


def allreduce_backward(input: Tensor, group: Group = None) -> Tensor:  # noqa: A002
    """Pass the input as it is; the gradient is summed over the ranks."""
    _check("allreduce_backward", input, group)
    return input


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
    _check("zero_gather", input, group)
    shape = input.shape if full_shape is None else torch.Size(full_shape)
    if shape.numel() > input.numel():
        raise ValueError(
            f"full_shape {list(shape)} has {shape.numel()} elements, but the ranks' parts have {input.numel()}"
        )
    return input.reshape(-1)[: shape.numel()].reshape(shape)


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
    _check("zero_scatter", input, group)
    return scatter_fn(input.reshape(-1), group=group), input.shape


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
    tensors = _tensors("batch_all_to_all_v", datas, group)
    sizes = torch.as_tensor(partition_sizes, dtype=torch.int64, device=tensors[0].device)
    if sizes.shape != (1,):
        raise ValueError(f"partition_sizes must hold one size a rank ([1]), got shape {list(sizes.shape)}")
    size = int(sizes)
    return [_first_elements(tensor, size) for tensor in tensors], sizes


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
    tensors = _tensors("batch_all_gather_v", datas, group)
    counts = {tensor.numel() for tensor in tensors}
    if len(counts) > 1:
        raise ValueError(f"datas must all have the same number of elements, got {sorted(counts)}")
    sizes = torch.tensor([tensors[0].numel()], dtype=torch.int64, device=tensors[0].device)
    return [tensor.reshape(-1) for tensor in tensors], sizes


def _check(what: str, value: object, group: Group, dims: Sequence[int] = ()) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{what}: input must be a torch.Tensor, got {type(value).__name__}")
    require_one_rank(what, group)
    for dim in dims:
        if not -value.dim() <= check_int("a dimension", dim) < value.dim():
            raise ValueError(f"{what}: input has no dimension {dim}, its shape is {list(value.shape)}")


def _check_op(op: object) -> None:
    # ReduceOp.SUM and its like are of a type of their own, which is nested in ReduceOp.
    if not isinstance(op, ReduceOp | cast(type, ReduceOp.RedOpType)):
        raise TypeError(f"op must be a torch.distributed.ReduceOp, got {op!r}")


def _tensors(what: str, datas: object, group: Group) -> list[Tensor]:
    if not isinstance(datas, list | tuple) or not datas or not all(isinstance(data, Tensor) for data in datas):
        raise TypeError(f"{what}: datas must be a list of at least one torch.Tensor, got {type(datas).__name__}")
    require_one_rank(what, group)
    return list(datas)


def _first_elements(tensor: Tensor, size: int) -> Tensor:
    if not 0 <= size <= tensor.numel():
        raise ValueError(
            f"partition_sizes must lie between 0 and the number of elements ({tensor.numel()}), got {size}"
        )
    return tensor if size == tensor.numel() else tensor.reshape(-1)[:size]


def _wait(*_unused: object) -> None:
    """Wait for what has happened already."""
