"""What ranks bring to a collective is compared before it: Gloo kills processes that receive more than they expect."""

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, distributed

from tutel import env
from tutel.distributed.failure import RankError, describe, stage
from tutel.distributed.groups import Group, group_device, world_size

#: A dtype's number in messages between ranks: its place here, which no version of torch may change.
_DTYPES = (
    *(torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.complex128),
)
#: Dimensions of a tensor that are compared.
_DIMS = 8
#: Further numbers that are compared.
_NUMBERS = 4
_ROW = 4 + _DIMS + _NUMBERS


def agree(name: str, tensor: Tensor, group: Group = None, *numbers: int) -> None:
    """Compare what the ranks bring to a collective; all of them call this.

    It happens on the CPU only, unless ``TUTEL_CHECK_RANKS`` says otherwise: elsewhere the host would have to wait for
    the device.

    Args:
        name: The collective.
        tensor: This rank's; dtype and shape must be those of the others.
        group: The ranks.
        numbers: At most four integers that must be those of the others.

    Raises:
        RankError: On every rank, if one brings something else; it says which rank brings what.
    """
    rows = _compare(name, _row(name, tensor, numbers), group, tensor)
    if len(set(rows)) > 1:
        told = [f"rank {rank} calls {_in_words(row, name)}" for rank, row in zip(_ranks(group), rows, strict=True)]
        raise _difference(f"{name} of {describe(tensor)}", told, rows, group)


def agree_on(name: str, settings: Mapping[str, object], group: Group = None) -> None:
    """Compare settings that the ranks must have in common, when and as :func:`agree` does.

    Args:
        name: What the ranks do together.
        settings: By their names; their texts are compared.
        group: The ranks.

    Raises:
        RankError: On every rank, if one has another setting; it says which rank has which.
    """
    nothing = torch.empty(0)
    texts = {key: str(value) for key, value in settings.items()}
    rows = _compare(name, _row(name, nothing, (zlib.crc32(repr(texts).encode()),)), group)
    if len(set(rows)) == 1:
        return
    if len({row[0] for row in rows}) > 1:  # a rank is somewhere else: it would not take part in what follows
        told = [f"rank {rank} calls {_in_words(row, name)}" for rank, row in zip(_ranks(group), rows, strict=True)]
        raise _difference(name, told, rows, group)
    everyone: list[Any] = [None] * len(rows)
    with stage(name, group):
        distributed.all_gather_object(everyone, texts, group=group)
    told = []
    for key in {key: None for theirs in everyone for key in theirs}:
        values = [theirs.get(key) for theirs in everyone]
        if len(set(values)) > 1:
            listed = ", ".join(f"{value} on rank {rank}" for rank, value in zip(_ranks(group), values, strict=True))
            told.append(f"{key} is {listed}")
    raise _difference(name, told, rows, group)


def _compare(name: str, mine: tuple[int, ...], group: Group, *tensors: Tensor) -> list[tuple[int, ...]]:
    """Return the rows of all ranks; this rank's alone where nothing is compared."""
    device = group_device(group)
    checked = env.check_ranks()
    if not (device.type == "cpu" if checked is None else checked):
        return [mine]
    table = torch.empty(world_size(group) * _ROW, dtype=torch.int64, device=device)
    with stage(name, group, *tensors):
        distributed.all_gather_into_tensor(table, torch.tensor(mine, device=device), group=group)
    return [tuple(row) for row in table.reshape(-1, _ROW).tolist()]


def _ranks(group: Group) -> Sequence[int]:
    return range(world_size()) if group is None else distributed.get_process_group_ranks(group)


def _difference(what: str, told: Sequence[str], rows: Sequence[object], group: Group) -> RankError:
    # The most frequent is taken for right, so that the odd ones out are named.
    usual = max(rows, key=rows.count)
    odd = [rank for rank, row in zip(_ranks(group), rows, strict=True) if row != usual]
    message = f"rank {distributed.get_rank()}: {what} failed: the ranks differ: {'; '.join(told)}"
    return RankError(message, distributed.get_rank(), what, reports=dict.fromkeys(odd, "brings something else"))


def _row(name: str, tensor: Tensor, numbers: tuple[int, ...]) -> tuple[int, ...]:
    dtype = _DTYPES.index(tensor.dtype) if tensor.dtype in _DTYPES else -1
    sizes = list(tensor.shape[:_DIMS])
    head = [zlib.crc32(name.encode()), dtype, tensor.dim(), tensor.numel()]
    return (*head, *sizes, *[0] * (_DIMS - len(sizes)), *numbers, *[0] * (_NUMBERS - len(numbers)))


def _in_words(row: Sequence[int], name: str) -> str:
    called, dtype, dims, _ = row[:4]
    what = name if called == zlib.crc32(name.encode()) else "another collective"
    kind = str(_DTYPES[dtype]).removeprefix("torch.") if dtype >= 0 else "another dtype"
    numbers = list(row[4 + _DIMS :])
    extra = f" with {numbers}" if any(numbers) else ""
    return f"{what} of {kind} {list(row[4 : 4 + min(dims, _DIMS)])}{extra}"
