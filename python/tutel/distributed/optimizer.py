"""An optimizer whose state for the parameters that all ranks share is divided among them."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ReduceOp
from torch.optim import Optimizer

from tutel.distributed import transport
from tutel.distributed.gradients import is_expert, present_anywhere
from tutel.distributed.groups import Group, world_rank, world_size
from tutel.errors import check_bool


class DistributedOptimizer:
    """Steps expert parameters where they are, and shared ones in parts, one part a rank.

    It does what the optimizer of :meth:`warp_local` does, for those that treat each element by itself, as SGD, Adam and
    AdamW do: a step sums the shared gradients over the ranks, each rank updates its part of every shared parameter, and
    the parts are gathered. So a rank keeps 1 / W of their state. Among one rank it is that optimizer, on groups of
    shared and of expert parameters.

    Args:
        params: Parameters, or groups of them as ``torch.optim`` takes them; the same on all ranks but for experts,
            which carry the mark ``_tutel_expert``.
        group: The ranks.
        average_shared: The shared parameters' gradient is the mean over the ranks, else the sum.

    Attributes:
        local_optim: The optimizer, after :meth:`warp_local`. Schedulers of learning rates take this one.

    Raises:
        TypeError: If params hold something else.
        ValueError: If there are no parameters.
    """

    local_optim: Optimizer

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        group: Group = None,
        average_shared: bool = False,
    ) -> None:
        self.group = group
        self.average_shared = check_bool("average_shared", average_shared)
        self._ranks = world_size(group)
        self._groups = [part for given in _parameter_groups(params) for part in _apart(given)]
        self._buckets: list[_Bucket] = []

    def warp_local(self, local_optim: Callable[..., Optimizer], *args: Any, **kwargs: Any) -> "DistributedOptimizer":
        """Make the optimizer: ``local_optim(parameters, *args, **kwargs)``, for example of ``torch.optim.SGD``.

        Shared parameters become those of rank 0 everywhere.

        Returns:
            This object.
        """
        groups = self._groups
        if self._ranks > 1:
            self._buckets = []
            groups = [self._divided(entry) for entry in groups]
            for bucket in self._buckets:
                bucket.broadcast()
        self.local_optim = local_optim(groups, *args, **kwargs)
        return self

    def _divided(self, entry: dict[str, Any]) -> dict[str, Any]:
        """Return a group with this rank's parts in the place of shared parameters."""
        if is_expert(entry["params"][0]):
            return entry
        parts: dict[nn.Parameter, nn.Parameter] = {}
        kinds = dict.fromkeys((parameter.dtype, parameter.device) for parameter in entry["params"])
        for kind in kinds:
            bucket = _Bucket([p for p in entry["params"] if (p.dtype, p.device) == kind], self.group)
            self._buckets.append(bucket)
            parts |= zip(bucket.parameters, bucket.parts, strict=True)
        return {**entry, "params": [parts[parameter] for parameter in entry["params"]]}

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups: learning rates are read and set here."""
        return self._made().param_groups

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of all parameters."""
        self._made().zero_grad(set_to_none=set_to_none)
        for parameter in self._shared():
            if set_to_none:
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad.detach_().zero_()

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update all parameters; among several ranks all of them call this.

        Args:
            closure: Computes loss and gradients, once.

        Returns:
            The closure's result.

        Raises:
            RankError: If another rank fails, or has other shared parameters.
        """
        optimizer = self._made()
        if self._ranks == 1:
            return optimizer.step() if closure is None else optimizer.step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        operation = ReduceOp.AVG if self.average_shared else ReduceOp.SUM
        with torch.no_grad():
            present = present_anywhere(self._shared(), self.group)
            for bucket in self._buckets:
                bucket.reduce_gradients(operation, present)
            optimizer.step()
            for bucket in self._buckets:
                bucket.gather()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return the state of this rank, for this rank of as many: shared parameters' is that of its parts."""
        state = self._made().state_dict()
        return state if self._ranks == 1 else {**state, "rank": world_rank(self.group), "world_size": self._ranks}

    def full_state_dict(self) -> dict[str, Any]:
        """Return the state with that of whole shared parameters, for any number of ranks; all ranks call this.

        Experts' state is that of this rank. Numbers of parameters are those of :attr:`param_groups`.

        Raises:
            RankError: If another rank does not come.
        """
        state = self._made().state_dict()
        whole = self._whole_by_number()

        def gathered(number: int, value: Any) -> Any:
            if number not in whole or not isinstance(value, Tensor) or value.dim() == 0:
                return value
            shape = whole[number].shape
            return transport.gather("full_state_dict", value, self.group)[: shape.numel()].reshape(shape)

        entries = state["state"].items()
        return {
            **state,
            "state": {n: {name: gathered(n, value) for name, value in entry.items()} for n, entry in entries},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Set the optimizer's state, from :meth:`state_dict` or :meth:`full_state_dict`.

        Raises:
            ValueError: If it is the state of another rank, or of one of another number of ranks.
        """
        given = {name: value for name, value in state_dict.items() if name not in ("rank", "world_size")}
        place, here = (state_dict.get("rank"), state_dict.get("world_size")), (world_rank(self.group), self._ranks)
        if place == (None, None):
            given["state"] = self._parts_of_state(given["state"])
        elif place != here:
            raise ValueError(
                f"state_dict is that of rank {place[0]} of {place[1]}, and this is rank {here[0]} of {here[1]}: "
                "save full_state_dict() to load it among another number of ranks"
            )
        self._made().load_state_dict(given)

    def _parts_of_state(self, state: dict[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
        whole = self._whole_by_number()

        def part(number: int, name: str, value: Any) -> Any:
            # A number as large as a parameter of one element can only be told by its name, as torch does.
            if (
                number not in whole
                or name == "step"
                or not isinstance(value, Tensor)
                or value.shape != whole[number].shape
            ):
                return value
            return _padded(value.detach(), self._ranks)[world_rank(self.group)].clone()

        return {n: {name: part(n, name, value) for name, value in entry.items()} for n, entry in state.items()}

    def _whole_by_number(self) -> dict[int, nn.Parameter]:
        """Give the shared parameters by the numbers that states give them; none among one rank."""
        whole = {part: p for bucket in self._buckets for p, part in zip(bucket.parameters, bucket.parts, strict=True)}
        numbered = [parameter for entry in self._made().param_groups for parameter in entry["params"]]
        return {number: whole[part] for number, part in enumerate(numbered) if part in whole}

    def _shared(self) -> list[nn.Parameter]:
        return [parameter for bucket in self._buckets for parameter in bucket.parameters]

    def _made(self) -> Optimizer:
        if not hasattr(self, "local_optim"):
            raise RuntimeError("there is no optimizer yet: call warp_local(torch.optim.SGD, lr=...) first")
        return self.local_optim


class _Bucket:
    """Shared parameters of one dtype and device, which travel together.

    Each is padded to W equal parts; row r of the buffer [W, sum of parts] holds part r of all of them.

    Args:
        parameters: On every rank the same.
        group: The ranks.

    Attributes:
        parts: This rank's part of each, a parameter of its own.
    """

    def __init__(self, parameters: list[nn.Parameter], group: Group) -> None:
        self.parameters, self.group = parameters, group
        self._ranks, self._rank = world_size(group), world_rank(group)
        self._sizes = [-(-parameter.numel() // self._ranks) for parameter in parameters]
        values = zip(parameters, self._own(), strict=True)
        self.parts = [nn.Parameter(value.clone(), parameter.requires_grad) for parameter, value in values]

    def broadcast(self) -> None:
        """Take rank 0's values."""
        whole = self._joined([parameter.detach() for parameter in self.parameters])
        self._set(transport.broadcast("shared parameters", whole, 0, self.group))

    def reduce_gradients(self, operation: Any, present: dict[Tensor, bool]) -> None:
        """Give each part its gradient, reduced over the ranks, and the values that its parameter has now."""
        grads = [torch.zeros_like(p) if p.grad is None else p.grad.detach() for p in self.parameters]
        own = transport.reduce_scatter("shared gradients", self._joined(grads), self.group, operation)
        reduced = torch.split(own.reshape(-1), self._sizes)
        for parameter, part, value, grad in zip(self.parameters, self.parts, self._own(), reduced, strict=True):
            part.data.copy_(value)  # loading a model's state, for example, changes parameters between steps
            # Of a parameter that no rank used the plain optimizer would touch neither value nor state.
            part.grad = grad if present[parameter] else None

    def gather(self) -> None:
        """Set the parameters from all ranks' parts."""
        mine = torch.cat([part.detach() for part in self.parts])
        self._set(transport.gather("shared parameters", mine.unsqueeze(0), self.group))

    def _own(self) -> list[Tensor]:
        return [_padded(parameter.detach(), self._ranks)[self._rank] for parameter in self.parameters]

    def _joined(self, tensors: list[Tensor]) -> Tensor:
        return torch.cat([_padded(tensor, self._ranks) for tensor in tensors], dim=1)

    def _set(self, whole: Tensor) -> None:
        for parameter, columns in zip(self.parameters, torch.split(whole, self._sizes, dim=1), strict=True):
            parameter.data.copy_(columns.reshape(-1)[: parameter.numel()].view_as(parameter))


def _padded(tensor: Tensor, ranks: int) -> Tensor:
    """Return a tensor's elements as [ranks, part], with zeros at the end."""
    flat = tensor.reshape(-1)
    return nn.functional.pad(flat, (0, -len(flat) % ranks)).reshape(ranks, -(-len(flat) // ranks))


def _parameter_groups(params: Iterable[Tensor] | Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    given: list[Any] = list(params)
    if not given:
        raise ValueError("params must hold at least one parameter, got none")
    if all(isinstance(entry, Tensor) for entry in given):
        return [{"params": given}]
    if not all(isinstance(entry, Mapping) and "params" in entry for entry in given):
        raise TypeError("params must be parameters, or dicts with the key 'params'")
    return [{**entry, "params": [entry["params"]]} if isinstance(entry["params"], Tensor) else entry for entry in given]


def _apart(group: dict[str, Any]) -> list[dict[str, Any]]:
    """Divide a group into that of its shared and that of its expert parameters, leaving out an empty one."""
    members = list(group["params"])
    experts = [p for p in members if is_expert(p)]
    shared = [p for p in members if not is_expert(p)]
    return [{**group, "params": part} for part in (shared, experts) if part]
