"""The state of one rank that holds all experts into those of W ranks.

Symbols: E experts in all, e of them on a rank, n ranks that share one (then e = 1).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tutel.checkpoint.division import Division, experts_and_shards
from tutel.checkpoint.errors import CheckpointError, refuse
from tutel.checkpoint.gathering import common_layers, divisions_of
from tutel.checkpoint.keys import COUNT, Layer, layer_of, numbered
from tutel.checkpoint.llama import is_flat, unflatten
from tutel.checkpoint.older import FileLayout, check_file_layout, layout_of, modern
from tutel.errors import check_int


def scatter_state(
    state: Mapping[str, Any],
    world_size: int,
    rank: int,
    *,
    default_num_global_experts: int | None = None,
    layout: str | None = None,
    shard_dims: Mapping[str, int] | None = None,
    model_dim: int | None = None,
) -> dict[str, Any]:
    """Return one rank's share of a state that holds all experts.

    Args:
        state: Of one rank with all E experts, as :func:`gather_states` returns it.
        world_size: W, ranks of the group: E must be a multiple of it or divide it.
        rank: The rank, from 0.
        default_num_global_experts: E of layers whose state does not tell.
        layout: As in :func:`gather_states`.
        shard_dims: For ranks that share an expert of a custom class: along which dimension of [E, ...] its parameters
            are cut into equal pieces, by their names within ``experts``.
        model_dim: D, which flat weights of ``llama_ffn`` need where the gate does not tell.

    Returns:
        The rank's state; tensors may share memory with those given.

    Raises:
        TypeError: If a number is no integer.
        ValueError: If an argument is out of range.
        CheckpointError: If the state cannot be divided so; the message has all keys.
    """
    world_size = check_int("world_size", world_size, at_least=1)
    rank = check_int("rank", rank, at_least=0)
    if rank >= world_size:
        raise ValueError(f"rank must be below world_size ({world_size}), got {rank}")
    layers = common_layers([state], ["the state"], default_num_global_experts)
    given = check_file_layout(layout)
    layouts = {
        layer: layout_of(layer, state, given, layer.num_experts, maybe_parts=layer.num_experts == 1 < world_size)
        for layer in layers
    }
    state = modern(state, layouts)
    shares = {
        layer: _Share(layer, layouts[layer], world_size, rank, divisions_of(layer, state, shard_dims), dim)
        for layer in layers
        for dim in [layer.model_dim(state) if model_dim is None else model_dim]
    }
    own: dict[str, Any] = {}
    problems = []
    for key in state:
        layer, value = layer_of(key, layers), state[key]
        if layer is None or not isinstance(value, Tensor):
            own[key] = value
            continue
        try:
            own.update(shares[layer].cut(key, value))
        except (ValueError, RuntimeError) as error:
            problems.append(f"{key}: {error}")
    refuse(f"the state cannot be divided over {world_size} ranks", problems)
    counts = {layer: world_size if layouts[layer] == "megatron" else layer.num_experts for layer in layers}
    return own | {layer.prefix + COUNT: torch.tensor(count) for layer, count in counts.items()}


class _Share:
    """Cuts one rank's share of the expert tensors of a layer."""

    def __init__(
        self,
        layer: Layer,
        layout: FileLayout,
        ranks: int,
        rank: int,
        known: Mapping[str, Division],
        model_dim: int | None,
    ) -> None:
        self.layer, self.layout, self.divisions, self.model_dim = layer, layout, known, model_dim
        try:
            self.e, self.n = experts_and_shards(layer.num_experts, ranks)
        except ValueError as error:
            raise CheckpointError(f"{layer.title}: {error}") from None
        if layout == "megatron" and layer.num_experts != 1:
            raise CheckpointError(f"{layer.title}: only one expert can be cut into parts, got {layer.num_experts}")
        if layout == "modules" and self.n > 1:
            raise CheckpointError(f"{layer.title}: a module cannot be shared by {self.n} ranks")
        self.first, self.shard = rank // self.n * self.e, rank % self.n

    def cut(self, key: str, value: Tensor) -> dict[str, Tensor]:
        """Return what becomes of one key's tensor.

        Raises:
            ValueError: If it cannot be cut.
        """
        name = key[len(self.layer.experts) :]
        if self.layout == "modules":
            found = numbered(name)
            if found is None or found[0] >= self.layer.num_experts:
                raise ValueError(f"{self.layer.num_experts} experts have numbers below that in their keys")
            number, rest = found[0] - self.first, found[1]
            return {f"{self.layer.experts}{number}.{rest}": value} if 0 <= number < self.e else {}
        if is_flat(name, value) or (name.startswith("W_fc") and value.dim() == 2):
            value = unflatten(name, value.reshape(-1), self.layer.num_experts, self.model_dim)
        if value.dim() == 0 or value.shape[0] != self.layer.num_experts:
            if name not in self.divisions:
                return {key: value}  # a constant of all experts
            raise ValueError(f"its shape is {list(value.shape)}, but there are {self.layer.num_experts} experts")
        own = value[self.first : self.first + self.e]
        if self.n == 1:
            return {key: own}
        division = self.divisions.get(name)
        if division is None:
            raise ValueError(f"{self.n} ranks would share an expert, and it is not known how: say by shard_dims")
        if self.layout == "megatron" and division.padded:
            return {key: own if self.shard == 0 else torch.zeros_like(own)}  # all ranks' are added
        if division.dim >= own.dim():
            raise ValueError(f"its shape {list(value.shape)} has no dimension {division.dim}")
        return {key: division.cut(own, self.n, self.shard)}
