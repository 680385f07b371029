"""Where the expert parameters of this rank stand among those of all ranks, for torch.distributed.checkpoint.

Symbols: W ranks of a layer's group, E experts in all, e of them on a rank, n ranks that share one (then e = 1), H
hidden units of a whole expert. Layers without gates, those of the gate ``megatron``, have one expert: E = 1 and n = W.
"""

import dataclasses
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.distributed import get_process_group_ranks, group
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Shard
from torch.nn.parallel import DistributedDataParallel

from tutel.checkpoint.division import Division, divisions
from tutel.checkpoint.keys import COUNT
from tutel.distributed.collectives import simple_all_reduce
from tutel.distributed.groups import Group, divide, world_rank, world_size
from tutel.experts import FFNExperts, ModuleExperts
from tutel.layer import MOELayer


@dataclasses.dataclass(frozen=True)
class Place:
    """The place of one expert parameter.

    Attributes:
        name: In states of all ranks; it has the expert's number among all, where experts are a list of modules.
        shape: Of the parameter on this rank.
        whole: Of all ranks' together: [E, ...], or [E, copies, H, ...] where hidden units stand there several times, so
            that a rank's part is one block of it.
        mesh: The ranks, [W] or [E, n]; None where this rank's is the whole.
        placements: How they divide it.
        division: How ranks that share an expert divide it.
        trained: Whether it gets gradients.
        coordinates: (expert, shard) of this rank: the number of its first expert, and of its share of it.
    """

    name: str
    shape: tuple[int, ...]
    whole: tuple[int, ...]
    mesh: DeviceMesh | None
    placements: tuple[Placement, ...]
    division: Division
    coordinates: tuple[int, int]
    trained: bool

    def shard(self, tensor: Tensor) -> Tensor:
        """Return a tensor of this rank, which has the parameter's shape, as a part of all ranks'; they share memory.

        Raises:
            ValueError: If it is divided already.
        """
        part = self._part(self._check_local(tensor))
        if self.mesh is None:
            return part
        whole = torch.Size(self.whole)
        stride = tuple(whole[dim + 1 :].numel() for dim in range(len(whole)))
        placed: Tensor = DTensor.from_local(
            part, self.mesh, self.placements, run_check=False, shape=whole, stride=stride
        )
        return placed

    def unshard(self, value: object) -> Tensor:
        """Return what of a tensor of all ranks is this rank's, in the parameter's shape.

        Raises:
            ValueError: If it is no such tensor.
        """
        value = self._check_whole(value)
        if isinstance(value, DTensor):
            if value.device_mesh != self.mesh or tuple(value.placements) != self.placements:
                raise ValueError(
                    f"{self.name} must be placed as {self.placements} on {self.mesh}, got {value.placements} on "
                    f"{value.device_mesh}"
                )
            part: Tensor = value.to_local()
        else:
            part = self._slice(value)
        if self.division.copies > 1:
            part = part.flatten(1, 2)
        return self.division.pad(part, self.shape[self.division.dim]) if self.division.padded else part

    @property
    def shared(self) -> bool:
        """Whether ranks have parts of one expert."""
        return len(self.placements) > 1

    def with_values(self, shape: tuple[int, ...]) -> "Place":
        """Return the place of values of another shape, [e, *shape]."""
        return dataclasses.replace(
            self, shape=(self.shape[0], *shape), whole=(self.whole[0], *shape), division=Division(len(shape) + 1)
        )

    def of_state(self) -> "Place":
        """Return the place of an optimizer's values of the parameter's shape."""
        return self

    def _check_local(self, tensor: Tensor) -> Tensor:
        if isinstance(tensor, DTensor):
            raise ValueError(f"{self.name} is divided already, as {tensor.placements}: keep experts out of fully_shard")
        return tensor.detach()

    def _check_whole(self, value: object) -> Tensor:
        if not isinstance(value, Tensor) or tuple(value.shape) != self.whole:
            found = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{self.name} must have shape {list(self.whole)} over all ranks, got {found}")
        return value

    def _part(self, tensor: Tensor) -> Tensor:
        """Return what of this rank's tensor is a part of the whole."""
        dim, copies = self.division.dim, self.division.copies
        if copies > 1:
            return torch.unflatten(tensor, dim, (copies, -1))
        if not self.division.padded:
            return tensor
        length, whole = tensor.shape[dim], self.whole[dim]
        return tensor.narrow(dim, 0, min(length, max(whole - self.coordinates[1] * length, 0)))

    def _slice(self, whole: Tensor) -> Tensor:
        part = whole[self.coordinates[0] : self.coordinates[0] + self.shape[0]]
        dim = self.division.dim + (self.division.copies > 1)
        if dim >= whole.dim():
            return part
        length = self.shape[self.division.dim] // self.division.copies
        start = min(self.coordinates[1] * length, whole.shape[dim])
        return part.narrow(dim, start, min(length, whole.shape[dim] - start))


@dataclasses.dataclass(frozen=True)
class AddedPlace(Place):
    """The place of a bias that every rank has, all of which are added: the outputs' bias of a layer without gates.

    The sum is what any number of ranks can load: the first takes it, the others have zeros, as in files.

    Attributes:
        ranks: That add theirs.
        mean: Whether it is for an optimizer's values. These are not added, since each rank's bias has the gradient of
            the whole: they are the same on all ranks, but for decay of the weights where that is a part of them.
    """

    ranks: Group
    mean: bool = False

    def shard(self, tensor: Tensor) -> Tensor:
        """Return the sum, or the mean, over all ranks, in new memory.

        Raises:
            ValueError: If it is divided already.
        """
        # In double precision the mean of narrower values that are the same has their bits.
        total = simple_all_reduce(self._check_local(tensor).double(), self.ranks)
        return (total / world_size(self.ranks) if self.mean else total).to(tensor.dtype)

    def unshard(self, value: object) -> Tensor:
        """Return this rank's summand, or the mean itself.

        Raises:
            ValueError: If it is no such tensor.
        """
        whole = self._check_whole(value)
        return whole if self.mean or self.coordinates[1] == 0 else torch.zeros_like(whole)

    def of_state(self) -> Place:
        """Return the place of an optimizer's values of the parameter's shape."""
        return dataclasses.replace(self, mean=True)


def find_parts(model: nn.Module) -> dict[str, int]:
    """Return how many parts of its expert a layer without gates has, by the key of its number of experts.

    The layer counts each part as an expert; over all ranks they are one.
    """
    return {
        _prefix_in_state(model, name) + COUNT: layer.num_global_experts
        for name, layer in model.named_modules()
        if isinstance(layer, MOELayer) and not layer.gates
    }


def find_places(
    model: nn.Module, default_group: Group = None, shard_dims: Mapping[str, int] | None = None
) -> dict[str, Place]:
    """Return the places of all expert parameters and buffers, by their names in this rank's state.

    Raises:
        ValueError: If a layer's experts cannot be put into one tensor, or its group has another number of ranks than
            it was made for.
    """
    places: dict[str, Place] = {}
    for module_name, layer in model.named_modules():
        if isinstance(layer, MOELayer):
            ranks = default_group if layer.group is None else layer.group
            if world_size(ranks) != layer.world_size:
                raise ValueError(
                    f"the layer {module_name!r} was made for {layer.world_size} ranks, but its group has "
                    f"{world_size(ranks)}"
                )
            prefix = _prefix_in_state(model, module_name)
            places.update(_layer_places(layer, f"{prefix}experts.", ranks, shard_dims))
    return places


def _layer_places(
    layer: MOELayer, prefix: str, ranks: Group, shard_dims: Mapping[str, int] | None
) -> Iterator[tuple[str, Place]]:
    e, n = layer.num_local_experts, layer.sharded_count if layer.gates else layer.world_size
    num_experts = layer.num_global_experts if layer.gates else 1
    rank = world_rank(ranks)
    coordinates = (rank // n * e, rank % n)
    tensors = {
        name: value for name, value in layer.experts.state_dict(keep_vars=True).items() if isinstance(value, Tensor)
    }
    known = divisions({name: value.shape for name, value in tensors.items()}, shard_dims)
    if isinstance(layer.experts, FFNExperts):
        copies = layer.experts.config.fc1_copies
        known = {
            name: dataclasses.replace(known[name], copies=copies) if "fc1" in name else known[name] for name in known
        }
    for name, tensor in tensors.items():
        shape, trained = tuple(tensor.shape), tensor.requires_grad
        if isinstance(layer.experts, ModuleExperts):
            number, _, rest = name.partition(".")
            own = Place(
                f"{prefix}{coordinates[0] + int(number)}.{rest}", shape, shape, None, (), Division(1), (0, 0), trained
            )
            yield prefix + name, own
        elif tensor.dim() > 0 and shape[0] == e:
            if n > 1 and name not in known:
                raise ValueError(
                    f"{prefix}{name}: {n} ranks share an expert, and it is not known how: say by shard_dims"
                )
            division = known.get(name, Division(1))
            if division.padded and n > 1 and not layer.gates:
                added = AddedPlace(prefix + name, shape, shape, None, (), division, coordinates, trained, ranks)
                yield prefix + name, added
                continue
            output_dim = layer.experts.output_dim if isinstance(layer.experts, FFNExperts) else None
            whole = _whole(shape, division, num_experts, n, output_dim)
            mesh = _mesh(ranks, n, tensor.device.type)
            dims = (0,) if n == 1 else (0, division.dim + (division.copies > 1))
            placements = () if mesh is None else tuple(Shard(dim) for dim in dims)
            yield prefix + name, Place(prefix + name, shape, whole, mesh, placements, division, coordinates, trained)
        elif isinstance(tensor, nn.Parameter) and layer.world_size > 1:
            raise ValueError(
                f"{prefix}{name} must have the rank's {e} experts as its first dimension, got {list(shape)}"
            )


def _whole(
    shape: tuple[int, ...], division: Division, num_experts: int, n: int, output_dim: int | None
) -> tuple[int, ...]:
    whole = [num_experts, *shape[1:]]
    dim, copies = division.dim, division.copies
    if n > 1:
        if dim >= len(whole):
            raise ValueError(
                f"shard_dims must be below the dimensions of a parameter of shape {list(shape)}, got {dim}"
            )
        whole[dim] *= n
        if division.padded and output_dim is not None:
            whole[dim] = output_dim
    if copies > 1:
        whole[dim : dim + 1] = [copies, whole[dim] // copies]
    return tuple(whole)


def _mesh(ranks: Group, n: int, device_type: str) -> DeviceMesh | None:
    """Return the ranks as [W], or as [E, n]."""
    size = world_size(ranks)
    if size == 1:
        return None
    everybody: Group = group.WORLD if ranks is None else ranks
    if n == 1:
        return DeviceMesh.from_group(everybody, device_type)
    neighbours, strided = divide(n, ranks)
    members = torch.tensor(get_process_group_ranks(everybody)).view(-1, n)
    groups: list[Group] = [everybody if part is None else part for part in (strided, neighbours)]
    return DeviceMesh.from_group(groups, device_type, mesh=members, mesh_dim_names=("experts", "shards"))


def _prefix_in_state(model: nn.Module, name: str) -> str:
    """Return what a module's keys begin with: empty, or ending in a dot."""
    return "".join(f"{part}." for part in _name_in_state(model, name))


def _name_in_state(model: nn.Module, name: str) -> Iterator[str]:
    """Give the parts of a module's name without the wrappers that torch.distributed.checkpoint leaves out."""
    module = model
    for part in filter(None, name.split(".")):
        wrapped = isinstance(module, DistributedDataParallel) and part == "module"
        if not wrapped and part != "_orig_mod":
            yield part
        module = getattr(module, part)
