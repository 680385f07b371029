"""Models that are trained on some ranks, saved, and loaded on others."""

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore
from tutel.checkpoint import (
    gather_states,
    load_sharded_optimizer_state_dict,
    load_sharded_state_dict,
    scatter_state,
    sharded_optimizer_state_dict,
    sharded_state_dict,
)

from tutel import moe, net

D, D_OUT, H, TOKENS = 6, 5, 24, 24


def _glu(hidden: Tensor) -> Tensor:
    value, gate = hidden.chunk(2, dim=-1)
    return value * torch.sigmoid(gate)


class OwnExperts(nn.Module):
    """Experts of a user's own class."""

    def __init__(self, model_dim: int, num_experts_per_device: int, sharded_count: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(num_experts_per_device, model_dim, model_dim))
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, rows: Tensor, _ctx: Any) -> Tensor:
        return rows @ self.w * self.scale


KINDS = {
    "ffn": {"type": "ffn", "hidden_size_per_expert": H, "output_dim": D_OUT},
    "llama": {"type": "llama_ffn", "hidden_size_per_expert": H},
    "glu": {"type": "ffn", "hidden_size_per_expert": H, "fc1_copies": 2, "activation_fn": _glu, "output_dim": D_OUT},
    "custom": {"type": "custom", "module": OwnExperts},
}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, amsgrad=True),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.01),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.01, initial_accumulator_value=0.1),
    "adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=0.01),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A model with E experts in all, and its optimizer."""

    kind: str
    experts: int
    optimizer: str

    def fits(self, ranks: int) -> bool:
        """Tell whether so many ranks can hold the experts."""
        whole = self.kind in ("custom", "modules")
        return self.experts % ranks == 0 or (ranks % self.experts == 0 and not whole)


CASES = [
    Case("ffn", 24, "adamw"),
    Case("llama", 24, "momentum"),
    Case("glu", 24, "adagrad"),
    Case("custom", 24, "adamw"),
    Case("modules", 24, "momentum"),
    Case("llama", 24, "adafactor"),
    Case("ffn", 24, "sgd"),
    Case("ffn", 4, "adamw"),
    Case("ffn", 2, "adamw"),
    Case("ffn", 1, "momentum"),
    Case("llama", 2, "adamw"),
    Case("glu", 2, "adagrad"),
]


class Model(nn.Module):
    def __init__(self, case: Case, group: Any = None) -> None:
        """Make it over the ranks of a group; what ranks share is the same on all of them."""
        super().__init__()
        ranks, rank = net.get_world_size(group), net.get_world_rank(group)
        count = case.experts // ranks if case.experts >= ranks else -(ranks // case.experts)
        torch.manual_seed(100 + rank)
        experts = (
            [nn.Linear(D, D) for _ in range(count)]
            if case.kind == "modules"
            else {**KINDS[case.kind], "count_per_node": count}
        )
        gate = {"type": "top", "k": 2, "capacity_factor": 0}
        self.moe = moe.moe_layer(gate, D, experts, seeds=(1, rank + 7, 2), group=group)
        self.input = nn.Linear(D, D)
        self.output = nn.Linear(D_OUT if case.kind in ("ffn", "glu") else D, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        output: Tensor = self.output(self.moe(self.input(tokens)))
        return output


def make(case: Case, group: Any = None) -> tuple[Model, torch.optim.Optimizer]:
    model = Model(case, group).double()
    return model, OPTIMIZERS[case.optimizer](model.parameters())


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, *, seed: int) -> list[float]:
    """Train on a batch that all ranks share, and return the losses of the whole batch."""
    ranks, rank = net.get_world_size(), net.get_world_rank()
    torch.manual_seed(seed)
    losses = []
    for _ in range(steps):
        tokens = torch.randn(TOKENS, D, dtype=torch.float64).chunk(ranks)[rank]
        optimizer.zero_grad()
        loss = model(tokens).square().sum() / TOKENS
        loss.backward()
        shared = [parameter.grad for parameter in model.parameters() if not hasattr(parameter, "_tutel_expert")]
        summed = torch.cat([loss.detach().view(1), *(gradient.flatten() for gradient in shared)])
        if distributed.is_initialized():
            distributed.all_reduce(summed)
        losses.append(summed[0].item())
        for gradient, total in zip(shared, summed[1:].split([each.numel() for each in shared]), strict=True):
            gradient.copy_(total.view_as(gradient))
        optimizer.step()
    return losses


def values_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """Return this rank's tensors: the weights, and each kind of the optimizer's values by the parameters' names."""
    counts = {key: value.clone() for key, value in model.state_dict().items() if key.endswith("_num_global_experts")}
    found = {"weights": {key: value.clone() for key, value in model.state_dict().items()}}
    for name, parameter in model.named_parameters():
        for kind, value in optimizer.state[parameter].items():
            if isinstance(value, Tensor):
                found.setdefault(kind, dict(counts))[name] = value.clone()
    return found


def save(folder: str) -> None:
    """Train all cases and save them; leave the ranks' tensors and the losses that follow as well."""
    trained = {}
    for number, case in enumerate(CASES):
        if case.fits(net.get_world_size()):
            model, optimizer = make(case)
            train(model, optimizer, 2, seed=5)
            trained[str(number)] = (model, optimizer)
    dcp.save({number: _state(*pair) for number, pair in trained.items()}, checkpoint_id=f"{folder}/checkpoint")
    left = {}
    for number, (model, optimizer) in trained.items():
        values = values_of(model, optimizer)
        left[number] = {"values": values, "losses": train(model, optimizer, 2, seed=6)}
    torch.save(left, _left(folder, net.get_world_rank(), net.get_world_size()))


def load(folder: str, saved_on: int) -> int:
    """Load on this rank, compare every tensor, and train on; return how many cases were compared."""
    ranks, rank = net.get_world_size(), net.get_world_rank()
    left = [torch.load(_left(folder, rank, saved_on), weights_only=True) for rank in range(saved_on)]
    cases = {number: CASES[int(number)] for number in left[0] if CASES[int(number)].fits(ranks)}
    made = {number: make(case) for number, case in cases.items()}
    for number, (model, optimizer) in made.items():
        # Some have trained already, and every element is replaced.
        if int(number) % 2 and not is_fake():
            train(model, optimizer, 1, seed=7)
    states = {number: _state(*pair) for number, pair in made.items()}
    dcp.load(states, checkpoint_id=f"{folder}/checkpoint", no_dist=is_fake())
    for number, case in cases.items():
        model, optimizer = made[number]
        load_sharded_state_dict(model, states[number]["model"])
        load_sharded_optimizer_state_dict(model, optimizer, states[number]["optimizer"])
        compare(case, values_of(model, optimizer), [own[number]["values"] for own in left], ranks, rank)
        # Adafactor's steps depend on the norm of whatever a rank holds.
        if not is_fake() and case.optimizer != "adafactor":
            torch.testing.assert_close(
                train(model, optimizer, 2, seed=6), left[0][number]["losses"], rtol=1e-10, atol=0
            )
    return len(cases)


def _state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"model": sharded_state_dict(model), "optimizer": sharded_optimizer_state_dict(model, optimizer)}


def compare(case: Case, found: dict[str, Any], saved: list[dict[str, Any]], ranks: int, rank: int) -> None:
    """Compare a rank's tensors with those that were saved, put together and divided as files are."""
    assert found.keys() == saved[0].keys()
    for kind, own in found.items():
        parts = [values[kind] for values in saved]
        if kind in ("row_var", "col_var", "step"):
            scattered = _by_expert(parts, ranks, rank)
        else:
            scattered = scatter_state(gather_states(parts), ranks, rank)
        assert own.keys() == scattered.keys(), (case, kind)
        for name, value in own.items():
            assert torch.equal(value, scattered[name]), (case, kind, name)


def _by_expert(parts: list[dict[str, Tensor]], ranks: int, rank: int) -> dict[str, Tensor]:
    """Divide values [e, ...] that are not shaped as parameters are, or are one for all experts."""
    divided = {}
    for name, value in parts[0].items():
        if value.dim() and "experts" in name and not name.endswith("_num_global_experts"):
            divided[name] = torch.cat([part[name] for part in parts]).chunk(ranks)[rank]
        else:
            divided[name] = value
    return divided


def is_fake() -> bool:
    """Tell whether the other ranks are imagined."""
    return distributed.is_initialized() and distributed.get_backend() == "fake"


@contextlib.contextmanager
def imagined(ranks: int, rank: int) -> Iterator[None]:
    """Be one of many ranks of which no other exists."""
    distributed.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    try:
        yield
    finally:
        distributed.destroy_process_group()


def load_imagined(folder: str, saved_on: int, ranks: int, some: Iterable[int]) -> list[int]:
    """Load on some of many ranks, one after the other."""
    counts = []
    for rank in some:
        with imagined(ranks, rank):
            counts.append(load(folder, saved_on))
    return counts


WRAPPED = Case("ffn", 24, "adamw")


def save_wrapped(folder: str) -> Tensor:
    """Save the same values from a model in DDP, one with FSDP, replicas in groups of two, and as a file a rank."""
    rank = net.get_world_rank()
    model, optimizer = make(WRAPPED)
    train(model, optimizer, 1, seed=5)
    torch.save(model.state_dict(), f"{folder}/{rank}-of-4.ckpt")
    states = {"plain": _state(model, optimizer)}

    # DDP sends the first rank's parameters to all: experts are not to be.
    names = [name for name, parameter in model.named_parameters() if hasattr(parameter, "_tutel_expert")]
    wrapped = copy.deepcopy(model)
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(wrapped, names)
    states["ddp"] = {"model": sharded_state_dict(DistributedDataParallel(wrapped))}

    fsdp = copy.deepcopy(model)
    fully_shard(fsdp.input)
    fully_shard(fsdp.output)
    # torch's loops over many tensors at once take no mixture.
    fsdp_optimizer = torch.optim.AdamW(fsdp.parameters(), lr=0.01, amsgrad=True, foreach=False)
    states["fsdp"] = _state(fsdp, fsdp_optimizer)
    load_sharded_optimizer_state_dict(
        fsdp, fsdp_optimizer, _like(states["fsdp"]["optimizer"], states["plain"]["optimizer"])
    )
    states["fsdp"]["optimizer"] = sharded_optimizer_state_dict(fsdp, fsdp_optimizer)

    pairs = distributed.new_group([0, 1]), distributed.new_group([2, 3])
    replica, replica_optimizer = make(WRAPPED, pairs[rank // 2])
    whole = {name: _full(value) for name, value in states["plain"]["model"].items()}
    load_sharded_state_dict(replica, whole)
    states["groups"] = _state(replica, replica_optimizer)
    dcp.save(states, checkpoint_id=f"{folder}/checkpoint")
    torch.manual_seed(3)
    return model(torch.randn(TOKENS, D, dtype=torch.float64).chunk(4)[rank]).detach()


def load_wrapped(folder: str) -> Tensor:
    """Load all of them on one rank, compare, and compute."""
    whole = torch.load(f"{folder}/all.ckpt", weights_only=True)
    plain: dict[str, dict[str, Tensor]] = {}
    for kind in ("plain", "ddp", "fsdp", "groups"):
        model, optimizer = make(WRAPPED)
        state = {kind: _state(model, optimizer) if kind in ("plain", "fsdp") else {"model": sharded_state_dict(model)}}
        dcp.load(state, checkpoint_id=f"{folder}/checkpoint", no_dist=True)
        load_sharded_state_dict(model, state[kind]["model"])
        for name, value in model.state_dict().items():
            assert torch.equal(value, whole[name]), (kind, name)
        if "optimizer" in state[kind]:
            load_sharded_optimizer_state_dict(model, optimizer, state[kind]["optimizer"])
            values = values_of(model, optimizer)
            plain = plain or values
            for name in values:
                for key, value in values[name].items():
                    assert torch.equal(value, plain[name][key]), (kind, name, key)
                    assert value.any(), (kind, name, key)
    model.load_state_dict(whole, strict=True)
    torch.manual_seed(3)
    tokens = torch.randn(TOKENS, D, dtype=torch.float64)
    return torch.cat([model(part) for part in tokens.chunk(4)]).detach()


#: Of `ffn` experts whose hidden units ranks divide, without a gate, by `fc1_copies`.
PARTS: dict[int, Callable[[Tensor], Tensor]] = {1: torch.tanh, 2: _glu}


@dataclasses.dataclass(frozen=True)
class Parted:
    """What a rank with a part of one expert has.

    Attributes:
        state: Of all ranks, with whole tensors.
        output: Of its tokens.
        losses: Of training that goes on.
    """

    state: dict[str, Any]
    output: Tensor
    losses: list[float]


def save_parts(folder: str) -> dict[int, Parted]:
    """Train layers with the gate `megatron`, and save them; as a file a rank as well."""
    trained = {copies: _make_parts(copies) for copies in PARTS}
    for model, optimizer in trained.values():
        train(model, optimizer, 2, seed=5)
    dcp.save({str(copies): _state(*pair) for copies, pair in trained.items()}, checkpoint_id=f"{folder}/checkpoint")
    for copies, (model, _) in trained.items():
        torch.save(model.state_dict(), f"{folder}/{copies}-{net.get_world_rank()}-of-{net.get_world_size()}.ckpt")
    return {copies: _parted(*pair) for copies, pair in trained.items()}


def load_parts(folder: str) -> dict[int, Parted]:
    """Load them, one of them where training had begun."""
    made = {copies: _make_parts(copies) for copies in PARTS}
    train(*made[2], 1, seed=7)
    states = {str(copies): _state(*pair) for copies, pair in made.items()}
    dcp.load(states, checkpoint_id=f"{folder}/checkpoint")
    for copies, (model, optimizer) in made.items():
        load_sharded_state_dict(model, states[str(copies)]["model"])
        load_sharded_optimizer_state_dict(model, optimizer, states[str(copies)]["optimizer"])
    return {copies: _parted(*pair) for copies, pair in made.items()}


def _make_parts(copies: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    ranks, rank = net.get_world_size(), net.get_world_rank()
    experts = {"type": "ffn", "hidden_size_per_expert": H // ranks, "fc1_copies": copies, "output_dim": D_OUT}
    torch.manual_seed(3)
    first = nn.Linear(D, D)
    layer = moe.moe_layer(
        {"type": "megatron"}, D, {**experts, "activation_fn": PARTS[copies]}, seeds=(1, 100 * ranks + rank, 2)
    )
    model = nn.Sequential(first, layer).double()
    return model, torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)


def _parted(model: nn.Module, optimizer: torch.optim.Optimizer) -> Parted:
    state = _state(model, optimizer)
    whole = {name: copy.deepcopy(_full(value)) for part in state.values() for name, value in part.items()}
    torch.manual_seed(9)
    tokens = torch.randn(TOKENS, D, dtype=torch.float64).chunk(net.get_world_size())[net.get_world_rank()]
    return Parted(whole, model(tokens).detach(), train(model, optimizer, 2, seed=6))


def _full(value: Any) -> Any:
    return value.full_tensor() if isinstance(value, DTensor) else value


def _like(templates: dict[str, Any], state: dict[str, Any]) -> dict[str, Any]:
    """Place plain tensors as others are placed that have been sharded since."""
    return {
        name: distribute_tensor(value, template.device_mesh, template.placements)
        if isinstance(template := templates[name], DTensor) and not isinstance(value, DTensor)
        else value
        for name, value in state.items()
    }


def _left(folder: str, rank: int, ranks: int) -> Path:
    return Path(folder) / f"{rank}-of-{ranks}.pt"
