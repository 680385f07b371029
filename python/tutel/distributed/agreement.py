"""What ranks bring to a collective is compared before it: Gloo kills processes that receive more than they expect."""

import zlib

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
    device = group_device(group)
    checked = env.check_ranks()
    if not (device.type == "cpu" if checked is None else checked):
        return
    mine = _row(name, tensor, numbers)
    table = torch.empty(world_size(group) * _ROW, dtype=torch.int64, device=device)
    with stage(name, group, tensor):
        distributed.all_gather_into_tensor(table, torch.tensor(mine, device=device), group=group)
    rows = table.reshape(-1, _ROW).tolist()
    if all(row == mine for row in rows):
        return
    ranks = range(len(rows)) if group is None else distributed.get_process_group_ranks(group)
    told = [f"rank {rank} calls {_in_words(row, name)}" for rank, row in zip(ranks, rows, strict=True)]
    # The most frequent is taken for right, so that the odd ones out are named.
    usual = max(rows, key=rows.count)
    odd = [rank for rank, row in zip(ranks, rows, strict=True) if row != usual]
    message = f"rank {distributed.get_rank()}: {name} of {describe(tensor)} failed: the ranks differ: {'; '.join(told)}"
    raise RankError(message, distributed.get_rank(), name, reports=dict.fromkeys(odd, "brings something else"))


def _row(name: str, tensor: Tensor, numbers: tuple[int, ...]) -> list[int]:
    dtype = _DTYPES.index(tensor.dtype) if tensor.dtype in _DTYPES else -1
    sizes = list(tensor.shape[:_DIMS])
    head = [zlib.crc32(name.encode()), dtype, tensor.dim(), tensor.numel()]
    return [*head, *sizes, *[0] * (_DIMS - len(sizes)), *numbers, *[0] * (_NUMBERS - len(numbers))]


def _in_words(row: list[int], name: str) -> str:
    called, dtype, dims, _ = row[:4]
    what = name if called == zlib.crc32(name.encode()) else "another collective"
    kind = str(_DTYPES[dtype]).removeprefix("torch.") if dtype >= 0 else "another dtype"
    numbers = row[4 + _DIMS :]
    extra = f" with {numbers}" if any(numbers) else ""
    return f"{what} of {kind} {row[4 : 4 + min(dims, _DIMS)]}{extra}"
