"""DeepSpeed's layer with one rank, against ours with its weights.

Its gate of two choices routes as ours does where tokens are not dropped and the second choice is not drawn at random.
It has rows [E, C, D] with C the load of the fullest expert, and masks [T, E, C].
"""

import importlib.util
import os
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benches.workload import Case, MissingPeerError, Side, Workload
from benches.workloads.layer import Sizes, forward_side
from benches.workloads.layer_work import experts_touched, forward_work, step_work
from benches.workloads.shapes import step

_NAME = "deepspeed MoE"


class _Expert(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        # Values that are overwritten need not be drawn.
        sizes = ((width, hidden), (hidden, width))
        self.fc1, self.fc2 = (nn.Linear(*size, device="meta").to_empty(device="cpu") for size in sizes)

    def forward(self, rows: Tensor) -> Any:
        return self.fc2(F.relu(self.fc1(rows)))


class _Layer(nn.Module):
    """Their layer, with an output as ours: without the loss and the counts."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, tokens: Tensor) -> Any:
        return self.layer(tokens)[0]


def _start() -> Any:
    """Import the library and make its world of one rank."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.moe.layer import MoE

    if not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()  # type: ignore[attr-defined]
        torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
        # Exchange between ranks through shared memory, which would be compiled now: there is one rank.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    return MoE


def _theirs(ours: nn.Module, sizes: Sizes) -> nn.Module:
    try:
        moe = _start()
        layer = moe(
            sizes.width,
            _Expert(sizes.width, sizes.hidden),
            num_experts=sizes.experts,
            k=sizes.top_k,
            drop_tokens=False,
            use_rts=False,
            top2_2nd_expert_sampling=False,
        )
    except Exception as error:  # whatever an import, a compiler or another version may raise
        raise MissingPeerError(_NAME, f"{type(error).__name__}: {error}") from error
    state: dict[str, Tensor] = {"deepspeed_moe.gate.wg.weight": ours.get_parameter("gates.0.wg.weight")}
    for ours_name, name in (
        ("fc1_w", "fc1.weight"),
        ("fc1_bias", "fc1.bias"),
        ("fc2_w", "fc2.weight"),
        ("fc2_bias", "fc2.bias"),
    ):
        every = ours.get_parameter(f"experts.batched_{ours_name}").detach()
        for expert in range(sizes.experts):
            weight = every[expert].T if ours_name == "fc2_w" else every[expert]
            state[f"deepspeed_moe.experts.deepspeed_experts.{expert}.{name}"] = weight
    layer.to(sizes.dtype).load_state_dict({key: value.detach().contiguous() for key, value in state.items()})
    return _Layer(layer)


def _build(sizes: Sizes, train: bool) -> Case:
    ours = sizes.ours()
    layers = {"tutel": ours, _NAME: _theirs(ours, sizes)}
    inputs = sizes.inputs(1)
    touched = experts_touched(ours, inputs)
    common: dict[str, Any] = {"tokens": sizes.tokens, "top_k": sizes.top_k, "width": sizes.width}
    common |= {"hidden": sizes.hidden, "matrices": 2, "touched": touched}
    if train:
        mine, theirs = (Side(name, partial(step, layer, inputs[0])) for name, layer in layers.items())
        return Case(mine, [theirs], step_work(sizes.dtype, experts=sizes.experts, **common))
    mine, theirs = (forward_side(name, layer, inputs) for name, layer in layers.items())
    return Case(mine, [theirs], forward_work(sizes.dtype, **common))


def _workloads() -> list[Workload]:
    if importlib.util.find_spec("deepspeed") is None:
        return []
    made = []
    for dtype in (torch.float32, torch.bfloat16):
        for sizes in (Sizes(dtype, 1, 1024, 1024, 8, 1024, 2), Sizes(dtype, 1, 1024, 1024, 64, 512, 2)):
            for kind in ("forward", "train"):
                case = partial(_build, sizes, kind == "train")
                made.append(Workload(f"deepspeed.{kind}.{sizes}", dtype, case, brief=True))
    return made


WORKLOADS = _workloads()
