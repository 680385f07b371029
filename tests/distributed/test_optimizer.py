"""The distributed optimizer, and torch's ZeroRedundancyOptimizer, beside one process that trains all ranks' models."""

import functools

import torch
from pytest import mark, raises
from ranks import run_ranks
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from tutel.distributed.gradients import is_expert, reduce_shared_gradients

from tutel import net

OPTIMIZERS = {
    "momentum": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}),
    "adam": (torch.optim.Adam, {"lr": 0.05, "amsgrad": True}),
    "adamw": (torch.optim.AdamW, {"lr": 0.05, "weight_decay": 0.3}),
}
STEPS = 4


class Model(nn.Module):
    """Shared layers of odd sizes around an expert a rank, and a parameter that nothing uses."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(1)
        self.first, self.last = nn.Linear(3, 5), nn.Linear(5, 1)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.unused = nn.Parameter(torch.ones(3))
        self.sometimes = nn.Parameter(torch.ones(2))
        torch.manual_seed(seed)
        self.expert = nn.Linear(5, 5)
        for parameter in self.expert.parameters():
            parameter._tutel_expert = True
        self.double()

    def forward(self, x, step=0):
        y = self.last(self.expert(torch.tanh(self.first(x)))) * self.scale
        return y.square().sum() + (self.sometimes.sum() * x.sum() if step % 2 else 0)


def tokens(rank, step):
    return torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(10 * rank + step))


def groups_of(model):
    """Two groups, one with a rate of its own that mixes shared and expert parameters."""
    slow = [model.first.bias, model.expert.bias, model.scale]
    chosen = {id(parameter) for parameter in slow}
    others = [parameter for parameter in model.parameters() if id(parameter) not in chosen]
    return [{"params": others}, {"params": slow, "lr": 0.01}]


def reference(world_size, kind, average):
    """Train all ranks' models in one process: gradients of shared parameters are reduced by hand."""
    make, options = OPTIMIZERS[kind]
    models = [Model(rank) for rank in range(world_size)]
    optimizers = [make(groups_of(model), **options) for model in models]
    for step in range(STEPS):
        for rank, model in enumerate(models):
            model.zero_grad()
            # What some ranks leave out counts as zero there.
            model(tokens(rank, step), step if rank == 0 else 0).backward()
        for copies in zip(*(model.parameters() for model in models), strict=True):
            if not is_expert(copies[0]):
                grads = [parameter.grad for parameter in copies if parameter.grad is not None]
                total = sum(grads) / (world_size if average else 1) if grads else None
                for parameter in copies:
                    parameter.grad = None if total is None else total.clone()
        for optimizer in optimizers:
            optimizer.step()
    return [[parameter.detach() for parameter in model.parameters()] for model in models]


def train(kind, average, how):
    make, options = OPTIMIZERS[kind]
    rank = net.get_world_rank()
    model = Model(rank)
    if rank > 0:  # what rank 0 has is what counts
        model.first.weight.data.zero_()
    optimizer = net.TutelDistributedOptimizer(groups_of(model), None, average).warp_local(make, **options)
    for step in range(STEPS):
        if step == 2 and how != "straight":
            state = optimizer.full_state_dict() if how == "full state" else optimizer.state_dict()
            optimizer = net.TutelDistributedOptimizer(groups_of(model), None, average).warp_local(make, **options)
            optimizer.load_state_dict(state)
        if how == "closure":
            optimizer.step(functools.partial(loss_of, model, optimizer, step))
        else:
            loss_of(model, optimizer, step)
            optimizer.step()
    kept = sum(
        value.numel()
        for entry in optimizer.state_dict()["state"].values()
        for value in entry.values()
        if torch.is_tensor(value) and value.dim() > 0
    )
    return [parameter.detach() for parameter in model.parameters()], kept


def loss_of(model, optimizer, step):
    optimizer.zero_grad(set_to_none=True)
    loss = model(tokens(net.get_world_rank(), step), step if net.get_world_rank() == 0 else 0)
    loss.backward()
    return loss


def train_in_every_way(cases):
    return [train(*case) for case in cases]


CASES = [(kind, average, "straight") for kind in OPTIMIZERS for average in (False, True)]
CASES += [("adamw", False, how) for how in ("full state", "own state", "closure")]


@mark.parametrize("world_size", [2, 3, 4])
def test_equals_the_plain_optimizer(world_size):
    found = run_ranks(train_in_every_way, world_size, CASES)
    for number, (kind, average, how) in enumerate(CASES):
        expected = reference(world_size, kind, average)
        for rank in range(world_size):
            values, _ = found[rank][number]
            for ours, theirs in zip(values, expected[rank], strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12, msg=f"{kind}, {how}, rank {rank}")


def test_a_rank_keeps_its_part_of_the_state():
    cases = [("adamw", False, "straight")]
    shared = [15, 5, 5, 1, 1, 2]  # elements of the shared parameters that are used
    expert = 25 + 5
    for _, kept in (result[0] for result in run_ranks(train_in_every_way, 4, cases)):
        assert kept == 2 * (expert + sum(-(-size // 4) for size in shared))


def states():
    """A state goes to another number of ranks as a whole only."""
    model = Model(net.get_world_rank())
    optimizer = net.TutelDistributedOptimizer(model.parameters()).warp_local(torch.optim.Adam)
    loss_of(model, optimizer, 1)
    optimizer.step()
    whole = optimizer.full_state_dict()
    plain = torch.optim.Adam([{"params": entry["params"]} for entry in optimizer._groups])
    plain.load_state_dict(whole)
    for parameter, entry in plain.state.items():
        assert entry["exp_avg"].shape == parameter.shape
    own = optimizer.state_dict()
    own["rank"] = 1 - own["rank"]
    with raises(ValueError, match=r"that of rank [01] of 2, and this is rank [01] of 2: save full_state_dict\(\)"):
        optimizer.load_state_dict(own)
    model.first.weight.data.fill_(3.0)  # as loading a model does: the next step starts from it
    optimizer.zero_grad()
    loss_of(model, optimizer, 1)
    optimizer.step()
    assert (model.first.weight - 3.0).abs().max() < 0.1
    optimizer.zero_grad(set_to_none=False)
    assert all((parameter.grad == 0).all() for parameter in model.parameters() if parameter.grad is not None)


def test_states():
    run_ranks(states, 2)


def train_redundancy_free():
    """torch's own: for shared parameters, beside a local optimizer of the experts."""
    rank = net.get_world_rank()
    model = Model(rank)
    shared = [parameter for parameter in model.parameters() if not is_expert(parameter)]
    experts = [parameter for parameter in model.parameters() if is_expert(parameter)]
    divided = ZeroRedundancyOptimizer(shared, torch.optim.AdamW, lr=0.05)
    local = torch.optim.AdamW(experts, lr=0.05)
    for step in range(STEPS):
        model.zero_grad()
        model(tokens(rank, step), step if rank == 0 else 0).backward()
        reduce_shared_gradients(model)
        divided.step()
        local.step()
    ours = Model(rank)
    optimizer = net.TutelDistributedOptimizer(ours.parameters()).warp_local(torch.optim.AdamW, lr=0.05)
    for step in range(STEPS):
        optimizer.zero_grad()
        ours(tokens(rank, step), step if rank == 0 else 0).backward()
        optimizer.step()
    for a, b in zip(model.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_zero_redundancy_optimizer_beside_a_local_one():
    run_ranks(train_redundancy_free, 2)
