"""Layers inside what PyTorch has for many ranks: DDP, FSDP2, DTensor; and the gate `megatron`."""

from typing import Any

import pytest
import torch
from layer_twin import HIDDEN, MODEL_DIM, Case, close, make_pair
from ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn.parallel import DistributedDataParallel
from tutel.layer import MOELayer

from tutel import net

CASE = Case(gate={"k": 2, "capacity_factor": 0.0})
STEPS = 4


class Block(nn.Module):
    """A dense layer and a layer of experts."""

    def __init__(self, layer: MOELayer) -> None:
        super().__init__()
        torch.manual_seed(11)
        self.dense = nn.Linear(MODEL_DIM, MODEL_DIM, dtype=torch.float64)
        self.moe = layer

    def forward(self, tokens: Tensor) -> Tensor:
        output: Tensor = self.moe(self.dense(tokens))
        return output


def blocks(group: Any = None) -> tuple[Block, Block, Tensor, Tensor]:
    """Return a block whose experts are divided among a group, its twin, this rank's tokens and those of all."""
    layer, twin = make_pair(CASE, group)
    torch.manual_seed(12)
    tokens = torch.randn(net.get_world_size() * 6, MODEL_DIM, dtype=torch.float64)
    return Block(layer), Block(twin), tokens.chunk(net.get_world_size())[net.get_world_rank()], tokens


def train(model: nn.Module, tokens: Tensor, scale: float) -> list[float]:
    """Train; gradients of the ranks are averaged, so that a rank's loss is its mean."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = (model(tokens) - tokens).square().mean()
        (loss * scale).backward()
        for parameter in model.parameters():
            if getattr(parameter, "_tutel_expert", False) and scale == 1:
                parameter.grad /= net.get_world_size()  # sums over the ranks' tokens
        optimizer.step()
        losses.append(float(net.simple_all_reduce(loss.detach()) / net.get_world_size()))
    return losses


def with_ddp() -> tuple[list[float], list[float]]:
    from tutel.distributed.gradients import ignore_experts

    block, twin, mine, every = blocks()
    ignore_experts(block)
    wrapped = DistributedDataParallel(block)
    return train(wrapped, mine, 1.0), reference(twin, every)


def with_fsdp() -> tuple[list[float], list[float]]:
    """The experts are divided by the layer; FSDP divides all else."""
    block, twin, mine, every = blocks()
    mesh = init_device_mesh("cpu", (net.get_world_size(),))
    experts = set(block.moe.experts.parameters())
    fully_shard(block, mesh=mesh, ignored_params=experts)
    assert isinstance(block.dense.weight, DTensor)
    assert not any(isinstance(parameter, DTensor) for parameter in block.moe.experts.parameters())
    return train(block, mine, 1.0), reference(twin, every)


def with_fsdp_and_a_mesh_of_experts() -> tuple[list[float], list[float]]:
    """Two replicas of the experts, each divided among two ranks; FSDP divides all else among the four."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "experts"))
    block, twin, mine, every = blocks(mesh["experts"].get_group())
    experts = list(block.moe.experts.parameters())

    def sum_over_replicas(parameter: Tensor) -> None:
        net.simple_all_reduce(parameter.grad, mesh["replicas"].get_group(), inplace=True)

    for parameter in experts:
        parameter.register_post_accumulate_grad_hook(sum_over_replicas)
    fully_shard(block, mesh=init_device_mesh("cpu", (4,)), ignored_params=set(experts))
    return train(block, mine, 1.0), reference(twin, every)


def reference(twin: nn.Module, tokens: Tensor) -> list[float]:
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.5)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = (twin(tokens) - tokens).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize(("way", "ranks"), [(with_ddp, 2), (with_fsdp, 2), (with_fsdp_and_a_mesh_of_experts, 4)])
def test_training_equals_one_process(way: Any, ranks: int) -> None:
    for losses, wanted in run_ranks(way, ranks):
        assert losses == pytest.approx(wanted, rel=1e-12)
        assert losses[-1] < losses[0]


def with_dtensor() -> str:
    layer, twin = make_pair(CASE)
    ranks = net.get_world_size()
    mesh = init_device_mesh("cpu", (ranks,))
    torch.manual_seed(1)
    whole = torch.randn(2, 4 * ranks, MODEL_DIM, dtype=torch.float64)
    given = DTensor.from_local(whole.chunk(ranks, 1)[net.get_world_rank()].contiguous(), mesh, [Shard(1)])
    output = layer(given.requires_grad_())
    assert output.placements == (Shard(1),)
    assert output.shape == whole.shape
    close(CASE, "output", output.full_tensor().detach(), twin(whole).detach())
    output.sum().backward()
    assert given.grad.placements == (Shard(1),)
    with pytest.raises(ValueError, match="redistribute"):
        layer(DTensor.from_local(whole, mesh, [Replicate()]))
    with pytest.raises(ValueError, match="redistribute"):
        layer(given.detach().redistribute(mesh, [Shard(2)]))
    return "done"


def test_dtensor_divided_along_tokens() -> None:
    assert run_ranks(with_dtensor, 2) == ["done", "done"]


def with_megatron(tokens: tuple[int, ...]) -> str:
    """One expert of W * H hidden units, of which each rank has H, equals the same expert on one rank."""
    ranks, rank = net.get_world_size(), net.get_world_rank()
    torch.manual_seed(4)
    whole = MOELayer(
        {"type": "megatron"},
        MODEL_DIM,
        {"type": "ffn", "hidden_size_per_expert": HIDDEN * ranks, "activation_fn": torch.tanh},
        group=net.create_standalone_group(),
    ).double()
    layer = MOELayer(
        {"type": "megatron"}, MODEL_DIM, {"type": "ffn", "hidden_size_per_expert": HIDDEN, "activation_fn": torch.tanh}
    ).double()
    with torch.no_grad():
        for name, parameter in layer.experts.named_parameters():
            full = dict(whole.experts.named_parameters())[name]
            # Every rank adds its own bias of the outputs: together they are the expert's.
            parameter.copy_(full / ranks if name.endswith("fc2_bias") else full.chunk(ranks, 1)[rank])
    torch.manual_seed(20 + rank)
    given = torch.randn(tokens[rank], MODEL_DIM, dtype=torch.float64)
    results = []
    for module in (layer, whole):
        source = given.clone().requires_grad_()
        output = module(source)
        output.square().sum().backward()
        results.append((output.detach(), source.grad))
    for what, found, wanted in zip(("output", "gradient of the input"), *results, strict=True):
        close(CASE, what, found, wanted)
    for name, parameter in whole.experts.named_parameters():
        summed = net.simple_all_reduce(parameter.grad)
        mine = dict(layer.experts.named_parameters())[name].grad
        close(CASE, name, mine, summed if name.endswith("fc2_bias") else summed.chunk(ranks, 1)[rank])
    assert float(layer.l_aux) == 0
    return "done"


@pytest.mark.parametrize(("ranks", "tokens"), [(2, (5, 5)), (3, (4, 0, 7))])
def test_megatron_equals_one_expert(ranks: int, tokens: tuple[int, ...]) -> None:
    assert run_ranks(with_megatron, ranks, tokens) == ["done"] * ranks
