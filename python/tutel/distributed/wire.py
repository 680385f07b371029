"""How rows are written while they travel between ranks: as they are, or in fewer bytes."""

from dataclasses import dataclass

import torch
from torch import Tensor

_FP8 = torch.float8_e4m3fn
_FP8_LARGEST = torch.finfo(_FP8).max
_SCALE_BYTES = 4


@dataclass(frozen=True)
class Wire:
    """How rows travel.

    bfloat16 keeps 8 significant bits: each value is within 2^-8 of itself. float8_e4m3 divides a row by its largest
    magnitude / 448 (which travels beside it as float32) and keeps 4 significant bits: each value is within 2^-4 of
    itself, or within 2^-10 / 448 of the row's largest. Gradients of float8 rows travel as bfloat16, since their range
    within a row is wider.

    Attributes:
        dtype: One of :data:`tutel.config.layer.WIRE_DTYPES`; None leaves rows as they are.
    """

    dtype: str | None = None

    def pack(self, rows: Tensor, *, gradient: bool) -> Tensor:
        """Write rows [R, D] as what is sent, [R, ...]."""
        kind = self._kind(rows.dtype, gradient)
        if kind is None:
            return rows
        if kind == "bfloat16":
            return rows.to(torch.bfloat16)
        largest = rows.abs().amax(1, keepdim=True) if rows.numel() else rows.new_zeros((rows.shape[0], 1))
        scale = (largest.float() / _FP8_LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
        narrow = (rows.float() / scale).to(_FP8)
        return torch.cat([narrow.view(torch.uint8), scale.view(torch.uint8)], dim=1)

    def unpack(self, payload: Tensor, dtype: torch.dtype, *, gradient: bool) -> Tensor:
        """Read what :meth:`pack` wrote, in a dtype."""
        kind = self._kind(dtype, gradient)
        if kind is None or kind == "bfloat16":
            return payload.to(dtype)
        narrow, scale = payload[:, :-_SCALE_BYTES].contiguous(), payload[:, -_SCALE_BYTES:].contiguous()
        values: Tensor = narrow.view(_FP8).float() * scale.view(torch.float32)
        return values.to(dtype)

    def _kind(self, dtype: torch.dtype, gradient: bool) -> str | None:
        """Return how rows of a dtype travel: never in more bytes than they have."""
        if self.dtype is None or (dtype.itemsize <= 2 and (gradient or self.dtype == "bfloat16")):
            return None
        return "bfloat16" if gradient else self.dtype
