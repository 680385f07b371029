"""How an expert parameter is divided over the n ranks that share an expert.

Symbols: E experts in all, e of them on a rank, n ranks that share one (then e = 1), H hidden units of a whole expert.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tutel.errors import check_int


@dataclasses.dataclass(frozen=True)
class Division:
    """One dimension of [E, ...] is cut into n pieces.

    Attributes:
        dim: The dimension.
        copies: It holds so many blocks one after the other, each of which is cut: ``fc1_copies``.
        padded: Pieces have ceil(size / n) elements, so the last ones may be filled up with zeros, or else size / n.
    """

    dim: int
    copies: int = 1
    padded: bool = False

    def piece(self, size: int, n: int) -> int:
        """Return how long a piece of a dimension is.

        Raises:
            ValueError: If it cannot be cut so.
        """
        if self.padded:
            return -(-size // n)
        if size % (n * self.copies) != 0:
            blocks = f"{self.copies} blocks of {n} equal pieces" if self.copies > 1 else f"{n} equal pieces"
            raise ValueError(f"dimension {self.dim} of size {size} cannot be cut into {blocks}")
        return size // n

    def join(self, pieces: Sequence[Tensor], size: int | None = None) -> Tensor:
        """Return the whole of n pieces.

        Args:
            pieces: In the order of their ranks.
            size: What is left of the dimension where padding is cut off; None means all.
        """
        if self.copies > 1:
            blocks = [torch.unflatten(piece, self.dim, (self.copies, -1)) for piece in pieces]
            whole = torch.cat(blocks, self.dim + 1).flatten(self.dim, self.dim + 1)
        else:
            whole = torch.cat(list(pieces), self.dim)
        return whole if size is None else whole.narrow(self.dim, 0, size)

    def cut(self, whole: Tensor, n: int, shard: int) -> Tensor:
        """Return one of n pieces, a view where nothing has to be filled up or put together.

        Raises:
            ValueError: If it cannot be cut so.
        """
        length = self.piece(whole.shape[self.dim], n)
        if self.copies > 1:
            blocks = torch.unflatten(whole, self.dim, (self.copies, -1))
            part = length // self.copies
            return blocks.narrow(self.dim + 1, shard * part, part).flatten(self.dim, self.dim + 1)
        start = min(shard * length, whole.shape[self.dim])
        there = min(length, whole.shape[self.dim] - start)
        piece = whole.narrow(self.dim, start, there)
        return self.pad(piece, length)

    def pad(self, piece: Tensor, length: int) -> Tensor:
        """Fill a piece up with zeros."""
        missing = length - piece.shape[self.dim]
        if missing == 0:
            return piece
        shape = list(piece.shape)
        shape[self.dim] = missing
        return torch.cat([piece, piece.new_zeros(shape)], self.dim)


#: Experts ``ffn`` and ``llama_ffn``, by the names of their parameters.
_KNOWN = {
    "batched_fc1_w": Division(1),
    "batched_fc1_bias": Division(1),
    "batched_fc2_w": Division(1),
    "batched_fc2_bias": Division(1, padded=True),
    "W_fc1": Division(2),
    "W_fc2": Division(2),
    "W_fc3": Division(1),
}


def divisions(shapes: Mapping[str, Sequence[int]], shard_dims: Mapping[str, int] | None) -> dict[str, Division]:
    """Return the divisions of a layer's expert parameters, as far as they are known.

    Args:
        shapes: Of the parameters, whole or not, by their names within ``experts``.
        shard_dims: The dimensions of others, which are cut into equal pieces; they win over known names.

    Raises:
        ValueError: If a dimension is not at least 1.
    """
    found = {name: _KNOWN[name] for name in shapes if name in _KNOWN}
    fc1, fc2 = shapes.get("batched_fc1_w"), shapes.get("batched_fc2_w")
    if fc1 is not None and fc2 is not None and len(fc1) == len(fc2) == 3 and fc2[1] > 0 and fc1[1] % fc2[1] == 0:
        copies = max(fc1[1] // fc2[1], 1)
        for name in ("batched_fc1_w", "batched_fc1_bias"):
            if name in found:
                found[name] = Division(1, copies)
    for name, dim in (shard_dims or {}).items():
        found[name] = Division(check_int(f"shard_dims[{name!r}]", dim, at_least=1))
    return found


def experts_and_shards(num_experts: int, ranks: int) -> tuple[int, int]:
    """Return (e, n): experts a rank, and ranks that share an expert.

    Raises:
        ValueError: If neither number divides the other.
    """
    if num_experts % ranks == 0:
        return num_experts // ranks, 1
    if ranks % num_experts == 0:
        return 1, ranks // num_experts
    raise ValueError(
        f"{num_experts} experts cannot be divided over {ranks} ranks: one number must be a multiple of the other"
    )
