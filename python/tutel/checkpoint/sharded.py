"""States for torch.distributed.checkpoint, which any number of ranks can load.

Expert parameters become ``DTensor``s, parts of tensors with all experts; the rest stays as it is. The tensors are
the model's own: ``torch.distributed.checkpoint`` saves each part once, and loads into each rank what that holds,
however many ranks there were:

    state = {"model": sharded_state_dict(model), "optimizer": sharded_optimizer_state_dict(model, optimizer)}
    torch.distributed.checkpoint.save(state, checkpoint_id=folder)

    torch.distributed.checkpoint.load(state, checkpoint_id=folder)
    load_sharded_state_dict(model, state["model"])
    load_sharded_optimizer_state_dict(model, optimizer, state["optimizer"])
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from tutel.checkpoint.errors import names
from tutel.checkpoint.keys import COUNT
from tutel.checkpoint.places import Place, find_parts, find_places
from tutel.distributed.groups import Group

#: One entry a parameter and value: what another number of ranks, with other groups of parameters, can read.
_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def sharded_state_dict(
    model: nn.Module, group: Group = None, *, shard_dims: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """Return a model's state with expert parameters as parts of tensors that hold all experts.

    All ranks of the layers' groups call it together; so it is with the other functions here.

    Args:
        model: A model with Mixture-of-Experts layers, in ``DistributedDataParallel`` or not.
        group: Of layers that have none of their own; None is the group of all ranks.
        shard_dims: For ranks that share an expert of a custom class: along which dimension of [1, ...] its parameters
            are cut, by their names within ``experts``.

    Returns:
        The state; its tensors share memory with the model's, but for the outputs' bias of a layer with the gate
        ``megatron`` on several ranks: it is the sum of theirs.

    Raises:
        ValueError: If the experts of a layer cannot be put into one tensor.
    """
    places, parts = find_places(model, group, shard_dims), find_parts(model)
    state: dict[str, Any] = dict(get_model_state_dict(model))
    _check_known(places, state)
    sharded: dict[str, Any] = {}
    for key, value in state.items():
        place = places.get(key)
        if place is not None:
            sharded[place.name] = place.shard(value)
        elif key in parts:
            sharded[key] = torch.ones_like(value)
        else:
            # Loading must not change what a state's number of experts is compared with.
            sharded[key] = value.clone() if key.endswith(COUNT) else value
    return sharded


def load_sharded_state_dict(
    model: nn.Module,
    state: Mapping[str, Any],
    group: Group = None,
    *,
    shard_dims: Mapping[str, int] | None = None,
    strict: bool = True,
) -> None:
    """Put a state of :func:`sharded_state_dict` into a model.

    Args:
        model: The model.
        state: The state; tensors of all experts may be plain ones as well, of which each rank takes its part.
        group: As there.
        shard_dims: As there.
        strict: Whether keys that are missing or unknown are an error.

    Raises:
        ValueError: If a tensor does not fit.
        RuntimeError: If keys do not fit.
    """
    places, parts = find_places(model, group, shard_dims), find_parts(model)
    by_name = {place.name: (key, place) for key, place in places.items()}
    own: dict[str, Any] = {}
    for name, value in state.items():
        key, place = by_name.get(name, (name, None))
        own[key] = value if place is None else place.unshard(value)
    for key in parts.keys() & own.keys():
        if own[key] != 1:
            raise ValueError(f"{key} must be 1, since the layer's ranks have parts of one expert, got {own[key]}")
        own[key] = torch.full_like(own[key], parts[key])
    set_model_state_dict(model, own, options=StateDictOptions(strict=strict))


def sharded_optimizer_state_dict(
    model: nn.Module, optimizer: Optimizer, group: Group = None, *, shard_dims: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """Return an optimizer's state, by parameters' names, with what belongs to expert parameters placed as these are.

    An optimizer that has made no step gets the state that it would start with, so that there is something to load into.

    Args:
        model: The model.
        optimizer: Of its parameters, or of some.
        group: As in :func:`sharded_state_dict`.
        shard_dims: As there.

    Returns:
        The state, with keys ``state.NAME.VALUE`` and ``param_groups.NAME.OPTION``. Of the outputs' bias of a layer with
        the gate ``megatron``, which every rank has, the values are the ranks' mean.

    Raises:
        ValueError: If the state of an expert parameter has neither its shape nor one value for all experts.
        RuntimeError: If expert parameters have no state, but others do.
    """
    places = find_places(model, group, shard_dims)
    with _own_gradients_aside(optimizer):
        fresh = not optimizer.state
        state: dict[str, Any] = dict(get_optimizer_state_dict(model, optimizer, options=_FLAT))
        if fresh:
            # It was made by a step with gradients of zero, which does not count.
            state = {key: _zero(value) if key.endswith(".step") else value for key, value in state.items()}
            optimizer.state.clear()
    if not fresh:
        _check_complete(places, optimizer, state)
    sharded: dict[str, Any] = {}
    for key, value in state.items():
        name, place = _parameter(key, places)
        if place is None:
            sharded[key] = value
        else:
            renamed = key.replace(name, place.name, 1)
            sharded[renamed] = _value_place(renamed, value, place).shard(value) if _is_placed(key, value) else value
    return sharded


def load_sharded_optimizer_state_dict(
    model: nn.Module,
    optimizer: Optimizer,
    state: Mapping[str, Any],
    group: Group = None,
    *,
    shard_dims: Mapping[str, int] | None = None,
) -> None:
    """Put a state of :func:`sharded_optimizer_state_dict` into an optimizer.

    Args:
        model: The model.
        optimizer: Of its parameters, or of some.
        state: The state; tensors of all experts may be plain ones as well, of which each rank takes its part.
        group: As in :func:`sharded_state_dict`.
        shard_dims: As there.

    Raises:
        ValueError: If a tensor does not fit.
        KeyError: If the state lacks something.
    """
    by_name = {place.name: (key, place) for key, place in find_places(model, group, shard_dims).items()}
    own: dict[str, Any] = {}
    for key, value in state.items():
        name, found = _parameter(key, by_name)
        if found is None:
            own[key] = value
        else:
            own_name, place = found
            own[key.replace(name, own_name, 1)] = (
                _value_place(key, value, place).unshard(value) if _is_placed(key, value) else value
            )
    with _own_gradients_aside(optimizer):
        set_optimizer_state_dict(model, optimizer, own, options=_FLAT)


T = TypeVar("T")


def _parameter(key: str, places: Mapping[str, T]) -> tuple[str, T | None]:
    """Return the expert parameter that an entry of an optimizer's state is for."""
    _, _, name = key.partition(".")
    while name:
        if name in places:
            return name, places[name]
        name, _, _ = name.rpartition(".")
    return "", None


def _is_placed(key: str, value: object) -> bool:
    """Tell whether a value belongs to experts, rather than to a parameter as a whole, as the number of steps does."""
    return key.startswith("state.") and isinstance(value, Tensor) and value.dim() > 0


def _value_place(key: str, value: Tensor, place: Place) -> Place:
    """Return the place of a value: its parameter's, or one like that, where it has another shape for each expert.

    Raises:
        ValueError: If experts' values cannot be told apart.
    """
    shape = tuple(value.shape)
    place = place.of_state()
    if shape in (place.shape, place.whole):
        return place
    if place.shared or shape[0] not in (place.shape[0], place.whole[0]):
        raise ValueError(
            f"{key} has shape {list(shape)}, and it is not known how ranks with parts of an expert divide it"
        )
    return place.with_values(shape[1:])


def _check_complete(places: Mapping[str, Place], optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Refuse a state that other ranks might have, and this one has not: some elements of a tensor would be nowhere."""
    known = {_parameter(key, places)[0] for key in state if key.startswith("state.")}
    given = {_parameter(key, places)[0] for key in state}
    missing = sorted(name for name in given - known if name and places[name].trained)
    if missing and any(optimizer.state.values()):
        raise RuntimeError(
            f"the optimizer has no state for {names(missing)}, which had no gradient yet: save after a step that "
            f"uses all experts, or with requires_grad=False for those that are not trained"
        )


@contextlib.contextmanager
def _own_gradients_aside(optimizer: Optimizer) -> Iterator[None]:
    """Put gradients aside: a state is started only where there are none."""
    parameters = [parameter for options in optimizer.param_groups for parameter in options["params"]]
    gradients = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient


def _zero(value: Any) -> Any:
    return torch.zeros_like(value) if isinstance(value, Tensor) else type(value)(0)


def _check_known(places: Mapping[str, Place], state: Mapping[str, Any]) -> None:
    unknown = [key for key in places if key not in state]
    if unknown:
        raise ValueError(f"the model's state has no {names(unknown)}: which wrapper is around its layers is not known")
