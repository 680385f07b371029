"""The states of W ranks into the state of one that holds all experts.

Symbols: E experts in all, e of them on a rank, n ranks that share one (then e = 1).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from tutel.checkpoint.division import Division, divisions, experts_and_shards
from tutel.checkpoint.errors import CheckpointError, names, refuse
from tutel.checkpoint.keys import COUNT, Layer, find_layers, layer_of, numbered
from tutel.checkpoint.llama import is_flat, unflatten
from tutel.checkpoint.older import FileLayout, check_file_layout, layout_of, modern
from tutel.checkpoint.same import same
from tutel.errors import check_choice, check_int

State = Mapping[str, Any]
#: What becomes of values that ought to be the same on all ranks, and are not: 'first' takes the first rank's, 'drop'
#: leaves them out.
AllowDifferent = Literal["first", "drop"]
_ALLOWED: tuple[AllowDifferent, ...] = ("first", "drop")


def gather_states(
    states: Sequence[State],
    *,
    default_num_global_experts: int | None = None,
    layout: str | None = None,
    shard_dims: Mapping[str, int] | None = None,
    model_dim: int | None = None,
    allow_different: str | None = None,
    titles: Sequence[str] | None = None,
    progress: Callable[[int], object] | None = None,
) -> dict[str, Any]:
    """Put the states of all ranks together.

    Args:
        states: One a rank, in order. The W = len(states) ranks are one group: each holds E / W experts, or W / E
            neighbours share each.
        default_num_global_experts: E of layers whose state does not tell.
        layout: Of the experts: 'batched', 'modules', 'megatron', 'v0.1.4' or 'v0.1.5', where names and shapes do not
            tell. 'megatron' are layers with that gate, which is for those without gates in the state: as many experts
            ``ffn`` as ranks may be such parts of one expert, and without a gate that is not guessed.
        shard_dims: For ranks that share an expert of a custom class: along which dimension of [1, ...] its parameters
            are cut, by their names within ``experts``.
        model_dim: D, which flat weights of ``llama_ffn`` need where the gate does not tell.
        allow_different: 'first' or 'drop' for shared values that are not the same on all ranks: an error if None.
        titles: What to call the ranks in messages.
        progress: Called with the bytes that were put together, key by key.

    Returns:
        The state of one rank that holds all E experts.

    Raises:
        ValueError: If an argument is out of range.
        CheckpointError: If the states do not belong together; the message has all keys and ranks.
    """
    if not states:
        raise ValueError("states must hold the state of at least one rank")
    titles = [f"rank {rank}" for rank in range(len(states))] if titles is None else titles
    allowed, given = check_allow_different(allow_different), check_file_layout(layout)
    layers = common_layers(states, titles, default_num_global_experts)
    _check_missing(states, titles)
    sizes = {layer: _experts_and_shards(layer, len(states)) for layer in layers}
    layouts = {
        layer: layout_of(layer, states[0], given, e, maybe_parts=1 < len(states) == layer.num_experts)
        for layer, (e, _) in sizes.items()
    }
    ranks = [modern(state, layouts) for state in states]
    joined = {
        layer: _Experts(layer, layouts[layer], *size, ranks, divisions_of(layer, ranks[0], shard_dims), model_dim)
        for layer, size in sizes.items()
    }
    whole = _join(ranks, layers, joined, allowed, titles[0], progress or (lambda _: None))
    counts = {layer: 1 if layouts[layer] == "megatron" else layer.num_experts for layer in layers}
    return whole | {layer.prefix + COUNT: torch.tensor(count) for layer, count in counts.items()}


def _join(
    ranks: Sequence[State],
    layers: Sequence[Layer],
    joined: Mapping[Layer, "_Experts"],
    allowed: AllowDifferent | None,
    title: str,
    progress: Callable[[int], object],
) -> dict[str, Any]:
    whole: dict[str, Any] = {}
    problems: list[str] = []
    different: list[str] = []
    for key in ranks[0]:
        values = [rank[key] for rank in ranks]
        layer = layer_of(key, layers)
        try:
            if layer is not None and isinstance(values[0], Tensor):
                whole.update(joined[layer].join(key, values))
            elif allowed == "first" or all(same(values[0], value) for value in values[1:]):
                whole[key] = values[0]
            elif allowed is None:
                different.append(key)
        except (ValueError, RuntimeError) as error:
            problems.append(f"{key}: {error}")
        progress(sum(value.nbytes for value in values if isinstance(value, Tensor)))
    refuse("the ranks' experts do not fit together", problems)
    if different:
        raise CheckpointError(
            f"shared values are not the same on all ranks: {names(different)} (allow_different='first' takes those of "
            f"{title})"
        )
    return whole


def check_allow_different(allow_different: object) -> AllowDifferent | None:
    """Check the name of what becomes of different values.

    Raises:
        ValueError: If there is no such name.
    """
    return check_choice("allow_different", allow_different, (None, *_ALLOWED))


def common_layers(states: Sequence[State], titles: Sequence[str], default: int | None) -> list[Layer]:
    """Find the layers of all ranks.

    Raises:
        CheckpointError: If there is none, or ranks say different numbers of experts.
    """
    if default is not None:
        default = check_int("default_num_global_experts", default, at_least=1)
    found: dict[str, tuple[Layer, str]] = {}
    problems = []
    for state, title in zip(states, titles, strict=True):
        try:
            layers = find_layers(state, default)
        except ValueError as error:
            problems.append(f"{title}: {error}")
            continue
        for layer in layers:
            first, who = found.setdefault(layer.prefix, (layer, title))
            if layer != first:
                problems.append(
                    f"{title}: {layer.title} has {layer.num_experts} experts, but {first.num_experts} in {who}"
                )
    refuse("the numbers of experts cannot be read", problems)
    if not found:
        raise CheckpointError(
            f"no Mixture-of-Experts layer found: no key ends in {COUNT!r}; files of older versions need "
            f"default_num_global_experts, files with the state inside an entry its name as namespace"
        )
    return [layer for layer, _ in found.values()]


def divisions_of(layer: Layer, state: State, shard_dims: Mapping[str, int] | None) -> dict[str, Division]:
    """Return how a layer's expert parameters are divided."""
    keys = {name: state[layer.experts + name] for name in layer.names(state)}
    return divisions({name: value.shape for name, value in keys.items() if isinstance(value, Tensor)}, shard_dims)


def _experts_and_shards(layer: Layer, ranks: int) -> tuple[int, int]:
    try:
        return experts_and_shards(layer.num_experts, ranks)
    except ValueError as error:
        raise CheckpointError(f"{layer.title}: {error}") from None


def _check_missing(states: Sequence[State], titles: Sequence[str]) -> None:
    everything = dict.fromkeys(key for state in states for key in state)
    problems = []
    for state, title in zip(states, titles, strict=True):
        missing = [key for key in everything if key not in state]
        if missing:
            problems.append(f"{title} lacks {names(missing)}")
    refuse("the set is incomplete", problems)


class _Experts:
    """Puts the expert tensors of one layer together."""

    def __init__(
        self,
        layer: Layer,
        layout: FileLayout,
        e: int,
        n: int,
        ranks: Sequence[State],
        known: Mapping[str, Division],
        model_dim: int | None,
    ) -> None:
        self.layer, self.layout, self.e, self.n, self.divisions = layer, layout, e, n, known
        self.model_dim = layer.model_dim(ranks[0]) if model_dim is None else model_dim
        fc2 = ranks[0].get(f"{layer.experts}batched_fc2_w")
        self.output_dim = fc2.shape[-1] if isinstance(fc2, Tensor) and fc2.dim() == 3 else None
        if layout == "megatron":
            if layer.num_experts != len(ranks):
                raise CheckpointError(f"{layer.title}: {len(ranks)} ranks have {layer.num_experts} parts of an expert")
            self.n = len(ranks)
        if layout == "modules" and n > 1:
            raise CheckpointError(f"{layer.title}: a module cannot be shared by {n} ranks")

    def join(self, key: str, pieces: list[Tensor]) -> dict[str, Tensor]:
        """Return what becomes of one key's tensors.

        Raises:
            ValueError: If they do not fit together.
        """
        name = key[len(self.layer.experts) :]
        if self.layout == "modules":
            found = numbered(name)
            if found is None or found[0] >= self.e:
                raise ValueError(f"a rank's {self.e} experts have numbers below that in their keys")
            number, rest = found
            return {f"{self.layer.experts}{rank * self.e + number}.{rest}": piece for rank, piece in enumerate(pieces)}
        _check_alike(pieces)
        return {key: self._batched(name, pieces)}

    def _batched(self, name: str, pieces: list[Tensor]) -> Tensor:
        if is_flat(name, pieces[0]):
            return torch.cat(
                [
                    unflatten(name, torch.cat(shards), self.e, self.model_dim, pieces=self.n)
                    for shards in self._by_expert(pieces)
                ]
            )
        if pieces[0].dim() == 0 or pieces[0].shape[0] != self.e:
            if name not in self.divisions and all(same(pieces[0], piece) for piece in pieces[1:]):
                return pieces[0]  # a constant of all experts
            shape = list(pieces[0].shape)
            raise ValueError(f"its shape is {shape}, but a rank holds {self.e} of {self.layer.num_experts} experts")
        if self.n == 1:
            return torch.cat(pieces)
        return torch.cat([self._whole(name, shards) for shards in self._by_expert(pieces)])

    def _by_expert(self, pieces: list[Tensor]) -> list[list[Tensor]]:
        return [pieces[first : first + self.n] for first in range(0, len(pieces), self.n)]

    def _whole(self, name: str, shards: list[Tensor]) -> Tensor:
        division = self.divisions.get(name)
        if division is None:
            raise ValueError(f"{self.n} ranks share an expert, and it is not known how: say by shard_dims")
        if division.dim >= shards[0].dim() or shards[0].shape[division.dim] % division.copies != 0:
            raise ValueError(f"a shape {list(shards[0].shape)} cannot be joined along dimension {division.dim}")
        if not division.padded or self.output_dim is None:
            return division.join(shards)
        width = shards[0].shape[division.dim]
        if self.layout != "batched" and width == self.output_dim:
            # Each rank had a bias of its own, and all were added.
            total = torch.stack(shards).sum(0, dtype=torch.promote_types(shards[0].dtype, torch.float32))
            return total.to(shards[0].dtype)
        if width != division.piece(self.output_dim, self.n):
            wanted = division.piece(self.output_dim, self.n)
            raise ValueError(f"a rank's share of {self.output_dim} values must be {wanted}, got {width}")
        return division.join(shards, self.output_dim)


def _check_alike(pieces: Sequence[Tensor]) -> None:
    first = pieces[0]
    for rank, piece in enumerate(pieces):
        if not isinstance(piece, Tensor) or piece.shape != first.shape or piece.dtype != first.dtype:
            found = f"{piece.dtype} {list(piece.shape)}" if isinstance(piece, Tensor) else type(piece).__name__
            raise ValueError(f"rank {rank} has {found}, but rank 0 {first.dtype} {list(first.shape)}")
