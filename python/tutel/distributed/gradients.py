"""Gradients in expert parallelism: parameters of experts are a rank's own, all others are shared by all ranks.

Experts' parameters carry the mark ``_tutel_expert``, which the layer gives them. Their gradients are complete as they
are: sums over the tokens of all ranks.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler, OptState
from torch.distributed import ReduceOp
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from tutel.distributed import transport
from tutel.distributed.groups import Group, group_device, world_size
from tutel.errors import check_bool, check_number

#: Gradients travel together in messages of about as many bytes.
BUCKET = 32 * 2**20


def is_expert(parameter: Tensor) -> bool:
    """Whether a parameter is an expert's."""
    return bool(getattr(parameter, "_tutel_expert", False))


def ignore_experts(model: nn.Module) -> nn.Module:
    """Have ``DistributedDataParallel`` leave experts' parameters alone; call it before the model is wrapped.

    Returns:
        The model.

    Raises:
        TypeError: If it is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    before = list(getattr(model, "_ddp_params_and_buffers_to_ignore", []))
    experts = [name for name, parameter in model.named_parameters(remove_duplicate=False) if is_expert(parameter)]
    ignored = list(dict.fromkeys([*before, *experts]))
    # It sets the attribute _ddp_params_and_buffers_to_ignore, and a mark on the parameters.
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)  # type: ignore[no-untyped-call]
    return model


def reduce_shared_gradients(model: nn.Module | Iterable[Tensor], group: Group = None, average: bool = False) -> None:
    """Sum the gradients of the parameters that are not experts' over the ranks, in place; all ranks call this.

    A gradient that only some ranks have counts as zero on the others; one that none has stays None.

    Args:
        model: A module, or parameters in the same order on all ranks.
        group: The ranks that share them.
        average: Divide by the number of ranks.

    Raises:
        TypeError: If model is neither.
        RankError: If another rank fails, or has other parameters.
    """
    parameters = model.parameters() if isinstance(model, nn.Module) else _parameters("model", model)
    ranks = world_size(group)
    operation = ReduceOp.AVG if check_bool("average", average) else ReduceOp.SUM
    shared = [parameter for parameter in parameters if parameter.requires_grad and not is_expert(parameter)]
    if ranks == 1 or not shared:
        return
    with torch.no_grad():
        present = present_anywhere(shared, group)
        for bucket in _buckets([parameter for parameter in shared if present[parameter]]):
            for parameter in bucket:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            grads = [parameter.grad for parameter in bucket if parameter.grad is not None]
            joined = torch.cat([grad.reshape(-1) for grad in grads])
            total = transport.all_reduce("shared gradients", joined, group, operation)
            for grad, part in zip(grads, torch.split(total, [grad.numel() for grad in grads]), strict=True):
                grad.copy_(part.view_as(grad))


def present_anywhere(parameters: Sequence[Tensor], group: Group) -> dict[Tensor, bool]:
    """Return which parameters have a gradient on any rank."""
    flags = [parameter.grad is not None for parameter in parameters]
    found = torch.tensor(flags, dtype=torch.uint8, device=group_device(group))
    transport.all_reduce("shared gradients", found, group, ReduceOp.MAX)
    return dict(zip(parameters, map(bool, found.tolist()), strict=True))


def clip_grad_norm(
    parameters: nn.Module | Tensor | Iterable[Tensor],
    max_norm: float,
    group: Group = None,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
) -> Tensor:
    """Scale gradients down so that the norm of all of them is at most ``max_norm``, as torch does; all ranks call this.

    The norm is that of the whole model: shared parameters count once, and experts' those of all ranks. So shared
    gradients must have been reduced before.

    Args:
        parameters: A module or parameters of this rank, shared ones and experts' (or shards of them).
        max_norm: The largest norm.
        group: The ranks that the experts are divided among.
        norm_type: The p of the norm; ``inf`` is the largest element.
        error_if_nonfinite: Whether a norm that is no finite number is an error; else gradients become NaN or 0.

    Returns:
        The norm before, 0-d, with the same bits on every rank.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If max_norm or norm_type is negative, or the norm is not finite and that is an error.
        RankError: If another rank fails.
    """
    max_norm = check_number("max_norm", max_norm, at_least=0)
    if norm_type != float("inf"):
        norm_type = check_number("norm_type", norm_type)
        if norm_type <= 0:
            raise ValueError(f"norm_type must be above 0, got {norm_type}")
    own = parameters.parameters() if isinstance(parameters, nn.Module) else _parameters("parameters", parameters)
    used = [parameter for parameter in own if parameter.grad is not None]
    device = used[0].device if used else group_device(group)
    shared = _norms([parameter for parameter in used if not is_expert(parameter)], norm_type, device)
    experts = _norms([parameter for parameter in used if is_expert(parameter)], norm_type, device)
    if world_size(group) > 1:
        # A number a rank, since ranks may hold different experts, or none.
        ours = torch.linalg.vector_norm(experts, norm_type).to(group_device(group))
        experts = transport.gather("clip_grad_norm", ours, group).to(device)
    total: Tensor = torch.linalg.vector_norm(torch.cat([shared, experts]), norm_type)
    if check_bool("error_if_nonfinite", error_if_nonfinite) and not torch.isfinite(total):
        raise ValueError(f"the norm of order {norm_type} of the gradients is {total.item()}: it cannot be clipped")
    factor = torch.clamp(max_norm / (total + 1e-6), max=1.0)
    for parameter in used:
        assert parameter.grad is not None
        parameter.grad.detach().mul_(factor.to(parameter.grad.device, parameter.grad.dtype))
    return total


def agree_on_overflow(scaler: GradScaler, optimizer: Optimizer, group: Group = None) -> None:
    """Have all ranks skip ``scaler.step(optimizer)`` if one of them found an infinity or NaN; all ranks call this.

    Experts' gradients differ between ranks, so one rank alone may find some. If it alone skipped its step, shared
    parameters and the scale would be others there from then on.

    It stands where ``scaler.unscale_(optimizer)`` does, or after it, and before the step. Shared gradients must have
    been reduced before. Nothing happens if the scaler is not enabled.

    Args:
        scaler: Enabled on all ranks or on none.
        optimizer: The same on all ranks but for experts. A rank where nothing has a gradient takes part.
        group: The ranks that share parameters.

    Raises:
        TypeError: If an argument has the wrong type.
        RuntimeError: If the optimizer has stepped since the last ``scaler.update()``.
        RankError: If another rank fails.
    """
    if not isinstance(scaler, GradScaler):
        raise TypeError(f"scaler must be a torch.amp.GradScaler, got {type(scaler).__name__}")
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if not scaler.is_enabled():
        return
    state = scaler._per_optimizer_states[id(optimizer)]
    if state["stage"] is not OptState.UNSCALED:
        scaler.unscale_(optimizer)
    if world_size(group) == 1:
        return
    flags: dict[torch.device, Tensor] = state["found_inf_per_device"]
    device = group_device(group)
    found = torch.zeros((), dtype=torch.float32, device=device)
    for flag in flags.values():
        found = torch.maximum(found, flag.reshape(()).to(device))
    transport.all_reduce("overflow of gradients", found, group, ReduceOp.MAX)
    for flag in flags.values():
        flag.copy_(found)
    if not flags:
        # The scaler's step and update fail where nothing was looked at.
        assert scaler._scale is not None
        flags[scaler._scale.device] = found.to(scaler._scale.device)


def _norms(parameters: Sequence[Tensor], norm_type: float, device: torch.device) -> Tensor:
    """Return the norm of each gradient, half types' made in fp32, as fp64; [0] at least, so that there is one."""
    norms = [torch.zeros((), dtype=torch.float64, device=device)]
    for parameter in parameters:
        assert parameter.grad is not None
        grad = parameter.grad.detach()
        wide = torch.float32 if grad.dtype in transport.HALF else grad.dtype
        norm = torch.linalg.vector_norm(grad, norm_type, dtype=wide)
        # That of a DTensor is one, too.
        whole = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        norms.append(whole.to(device, torch.float64))
    return torch.stack(norms)


def _parameters(name: str, given: object) -> list[Tensor]:
    if isinstance(given, Tensor):
        return [given]
    if not isinstance(given, Iterable) or isinstance(given, str | dict):
        raise TypeError(f"{name} must be a torch.nn.Module or parameters, got {type(given).__name__}")
    parameters = list(given)
    for parameter in parameters:
        if not isinstance(parameter, Tensor):
            raise TypeError(f"{name} must be a torch.nn.Module or parameters, got one of {type(parameter).__name__}")
    return parameters


def _buckets(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Divide parameters into lists of one dtype and device, and of about BUCKET bytes."""
    kinds = dict.fromkeys((parameter.dtype, parameter.device) for parameter in parameters)
    for kind in kinds:
        bucket: list[Tensor] = []
        size = 0
        for parameter in [parameter for parameter in parameters if (parameter.dtype, parameter.device) == kind]:
            bucket.append(parameter)
            size += parameter.numel() * parameter.element_size()
            if size >= BUCKET:
                yield bucket
                bucket, size = [], 0
        if bucket:
            yield bucket
