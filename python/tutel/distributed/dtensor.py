"""Inputs that are DTensors: each rank computes the tokens that it has."""

import sys
from collections.abc import Callable

from torch import Tensor


def take_local(value: Tensor, reserve_dims: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return this rank's part of an input, and what makes an output of it again; any other tensor passes.

    Args:
        value: An input, perhaps a DTensor that is divided along its tokens, as sequence parallelism leaves it.
        reserve_dims: How many trailing dimensions make up a token.

    Raises:
        ValueError: If a DTensor is divided otherwise, or is the same on all ranks (which would all compute it).
    """
    # Where nobody has imported the module, there is no such tensor, and importing it takes a while.
    module = None if type(value) is Tensor else sys.modules.get("torch.distributed.tensor")
    if module is None or not isinstance(value, module.DTensor):
        return value, _same
    token_dims = value.dim() - reserve_dims
    for placement in value.placements:
        if not isinstance(placement, module.Shard) or placement.dim % value.dim() >= token_dims:
            raise ValueError(
                f"input as a DTensor must be Shard(d) with d below {token_dims}, its number of dimensions that count "
                f"tokens, on every dimension of its mesh; got {value.placements}: redistribute it"
            )
    mesh, placements, shape = value.device_mesh, value.placements, value.shape[:token_dims]

    def give_back(output: Tensor) -> Tensor:
        whole = (*shape, *output.shape[token_dims:])
        stride, strides = 1, []
        for size in reversed(whole):
            strides.append(stride)
            stride *= size
        result: Tensor = module.DTensor.from_local(
            output.contiguous(), mesh, placements, run_check=False, shape=whole, stride=tuple(reversed(strides))
        )
        return result

    local: Tensor = value.to_local()
    return local, give_back


def _same(output: Tensor) -> Tensor:
    return output
