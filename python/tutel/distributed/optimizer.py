"""An optimizer whose state for the parameters that all ranks share is divided among them."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from tutel.distributed.groups import Group, require_one_rank
from tutel.errors import check_bool


class DistributedOptimizer:
    """Steps expert parameters where they are, and shared ones in parts, one part a rank.

    Among one rank it is the optimizer that :meth:`warp_local` is given, on groups of shared and of expert parameters.

    Args:
        params: Parameters, or groups of them as ``torch.optim`` takes them. Experts' carry the mark ``_tutel_expert``.
        group: The ranks.
        average_shared: The shared parameters' gradient is the mean over the ranks, else the sum.

    Attributes:
        local_optim: The optimizer, after :meth:`warp_local`.

    Raises:
        TypeError: If params hold something else.
        ValueError: If there are no parameters.
        NotImplementedError: If there are several ranks.
    """

    local_optim: Optimizer

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        group: Group = None,
        average_shared: bool = False,
    ) -> None:
        require_one_rank("an optimizer", group)
        self.group = group
        self.average_shared = check_bool("average_shared", average_shared)
        self._groups = [part for given in _parameter_groups(params) for part in _apart(given)]

    def warp_local(self, local_optim: Callable[..., Optimizer], *args: Any, **kwargs: Any) -> "DistributedOptimizer":
        """Make the optimizer: ``local_optim(parameters, *args, **kwargs)``, for example of ``torch.optim.SGD``.

        Returns:
            This object.
        """
        self.local_optim = local_optim(self._groups, *args, **kwargs)
        return self

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups: learning rates are read and set here."""
        return self._made().param_groups

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of all parameters."""
        self._made().zero_grad(set_to_none=set_to_none)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update all parameters; arguments and result are those of the optimizer."""
        return self._made().step() if closure is None else self._made().step(closure)

    def state_dict(self) -> dict[str, Any]:
        """Return the optimizer's state."""
        return self._made().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Set the optimizer's state."""
        self._made().load_state_dict(state_dict)

    def _made(self) -> Optimizer:
        if not hasattr(self, "local_optim"):
            raise RuntimeError("there is no optimizer yet: call warp_local(torch.optim.SGD, lr=...) first")
        return self.local_optim


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
    experts = [p for p in members if getattr(p, "_tutel_expert", False)]
    shared = [p for p in members if not getattr(p, "_tutel_expert", False)]
    return [{**group, "params": part} for part in (shared, experts) if part]
