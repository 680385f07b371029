"""Gradients over W ranks: sums of shared ones, norms that count each expert once, and torch's wrappers beside them."""

import copy
import math

import torch
from layer_twin import MODEL_DIM, Case, make_pair, part_of
from pytest import mark, raises
from ranks import run_ranks
from torch import nn
from torch.amp import GradScaler
from tutel.distributed import (
    DistributedOptimizer,
    agree_on_overflow,
    clip_grad_norm,
    ignore_experts,
    reduce_shared_gradients,
)

from tutel import moe, net


def sgd(*parameters, **options):
    return torch.optim.SGD(parameters or [nn.Parameter(torch.zeros(2))], lr=0.125, **options)


def filled(rank, dtype=torch.float64):
    """A rank's parameters with gradients: shared ones alike, experts' its own; rank 0 has an expert more."""
    generator = torch.Generator().manual_seed(9)
    shared = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in ((3, 5), (4,), ())]
    for parameter in shared:
        parameter.grad = torch.randn(parameter.shape, dtype=torch.float64, generator=generator).to(dtype)
    generator.manual_seed(rank)
    experts = [nn.Parameter(torch.zeros(2, 3, dtype=dtype)) for _ in range(2 if rank == 0 else 1)]
    for parameter in experts:
        parameter._tutel_expert = True
        parameter.grad = torch.randn(parameter.shape, dtype=torch.float64, generator=generator).to(dtype)
    return shared, experts, [nn.Parameter(torch.zeros(2))]  # the last has no gradient


#: What one rank finds in an expert's gradient, step by step.
FOUND = [1.0, math.inf, 1.0, 1.0, math.nan, 1.0]


def train_scaled(model, tokens, optimizer, spoils, before_step):
    """Train with a scale that halves and grows; give the scaler's state after each step."""
    scaler, states = GradScaler("cpu", init_scale=2.0**10, growth_interval=2), []
    for found in FOUND:
        optimizer.zero_grad()
        scaler.scale(model(tokens).square().sum()).backward()
        if spoils:
            next(model.experts.parameters()).grad.view(-1)[0] *= found
        before_step(scaler)
        scaler.step(optimizer)
        scaler.update()
        states.append(scaler.state_dict())
    return states


def skip_together(fused, unscale_first):
    """The second rank finds nothing, skips the same steps all the same, and trains as one process does."""
    rank, size = net.get_world_rank(), net.get_world_size()
    layer, twin = make_pair(Case())
    optimizer, twins = (sgd(*module.parameters(), momentum=0.5, fused=fused) for module in (layer, twin))
    tokens = torch.randn(size * 6, MODEL_DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) / 4

    def before_step(scaler):
        reduce_shared_gradients(layer)
        if unscale_first:
            scaler.unscale_(optimizer)
        agree_on_overflow(scaler, optimizer)

    states = train_scaled(layer, tokens.chunk(size)[rank], optimizer, rank == 0, before_step)
    assert states == train_scaled(twin, tokens, twins, True, lambda _scaler: None)
    assert [state["scale"] / 2**10 for state in states] == [1.0, 0.5, 0.5, 1.0, 0.5, 0.5]
    near = {"rtol": 1e-10, "atol": 1e-12}
    for ours, theirs in zip(layer.gates.parameters(), twin.gates.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, **near)
        everywhere = net.simple_all_gather(ours.detach().unsqueeze(0))
        assert all(torch.equal(other, everywhere[0]) for other in everywhere)
    for (name, ours), theirs in zip(layer.experts.named_parameters(), twin.experts.parameters(), strict=True):
        torch.testing.assert_close(ours.detach(), part_of(name, theirs.detach(), rank, size, layer, ours), **near)


@mark.parametrize(("fused", "unscale_first"), [(False, True), (True, False)])
def test_ranks_skip_a_step_together(fused, unscale_first):
    run_ranks(skip_together, 2, fused, unscale_first)


def skip_without_gradients():
    parameter = nn.Parameter(torch.zeros(2))
    scaler, optimizer = GradScaler("cpu", init_scale=4.0), sgd(parameter)
    torch.set_default_dtype(torch.bfloat16)  # which must not be that of what ranks compare
    for found in (1.0, math.inf):
        optimizer.zero_grad()
        loss = scaler.scale(parameter.sum())
        if net.get_world_rank() == 0:
            loss.backward()
            parameter.grad[0] *= found
        agree_on_overflow(scaler, optimizer)
        scaler.step(optimizer)
        scaler.update()
    return parameter.tolist(), scaler.get_scale()


def test_a_rank_without_gradients_skips_too():
    assert run_ranks(skip_without_gradients, 2) == [([-0.125, -0.125], 2.0), ([0.0, 0.0], 2.0)]


def test_overflow_in_one_process():
    parameter = nn.Parameter(torch.zeros(2))
    scaler, optimizer = GradScaler("cpu", init_scale=4.0), sgd(parameter)
    scaler.scale(parameter.sum()).backward()
    agree_on_overflow(scaler, optimizer)
    agree_on_overflow(scaler, optimizer)
    assert parameter.grad.tolist() == [1.0, 1.0]  # unscaled once
    scaler.step(optimizer)
    with raises(RuntimeError, match="after step"):
        agree_on_overflow(scaler, optimizer)
    agree_on_overflow(GradScaler("cpu", enabled=False), optimizer)
    assert parameter.grad.tolist() == [1.0, 1.0]


NORMS = [(0.5, 2.0), (1e6, 2.0), (0.5, math.inf), (0.1, 1.0), (0.3, 3.0), (0.0, 2.0)]


def clip_all(dtype):
    rank, size = net.get_world_rank(), net.get_world_size()
    found = []
    for max_norm, norm_type in NORMS:
        shared, experts, unused = filled(rank, dtype)
        total = clip_grad_norm([*shared, *experts, *unused], max_norm, None, norm_type)
        # One process that has all experts, clipped by torch.
        others = [filled(other, dtype)[1] for other in range(size)]
        whole = filled(0, dtype)[0] + [parameter for each in others for parameter in each]
        theirs = nn.utils.clip_grad_norm_(whole, max_norm, norm_type)
        near = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-2, "atol": 1e-2}
        torch.testing.assert_close(total.to(dtype), theirs, **near)
        for ours, wanted in zip([*shared, *experts], [*whole[:3], *others[rank]], strict=True):
            torch.testing.assert_close(ours.grad, wanted.grad, **near)
        found.append(total.item())
    return found


@mark.parametrize(("world_size", "dtype"), [(2, torch.float64), (3, torch.float64), (4, torch.bfloat16)])
def test_clipping_counts_every_expert_once(world_size, dtype):
    results = run_ranks(clip_all, world_size, dtype)
    assert all(found == results[0] for found in results)  # the same bits


def test_clipping_in_one_process_is_torchs():
    for max_norm, norm_type in NORMS:
        ours, theirs = ([p for part in filled(0) for p in part] for _ in range(2))
        total = clip_grad_norm(ours, max_norm, norm_type=norm_type)
        torch.testing.assert_close(total, nn.utils.clip_grad_norm_(theirs, max_norm, norm_type))
        for a, b in zip(ours[:-1], theirs[:-1], strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=1e-12)
    single = nn.Parameter(torch.zeros(2))
    assert clip_grad_norm(single, 1.0).item() == 0.0
    single.grad = torch.tensor([math.nan, 1.0])
    with raises(ValueError, match="norm of order inf of the gradients is nan"):
        clip_grad_norm(single, 1.0, norm_type=math.inf, error_if_nonfinite=True)


@mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: clip_grad_norm("w", 1.0), TypeError, "parameters must be a torch.nn.Module or parameters, got str"),
        (lambda: clip_grad_norm([1.0], 1.0), TypeError, "got one of float"),
        (lambda: clip_grad_norm([], -1.0), ValueError, "max_norm must be at least 0, got -1.0"),
        (lambda: clip_grad_norm([], 1.0, norm_type=0), ValueError, "norm_type must be above 0, got 0.0"),
        (lambda: clip_grad_norm([], 1.0, norm_type="2"), TypeError, "norm_type must be a number, got '2'"),
        (lambda: reduce_shared_gradients(3), TypeError, "model must be a torch.nn.Module or parameters, got int"),
        (lambda: reduce_shared_gradients([], average=None), TypeError, "average must be True or False, got None"),
        (lambda: ignore_experts([]), TypeError, "model must be a torch.nn.Module, got list"),
        (lambda: agree_on_overflow(None, sgd()), TypeError, "scaler must be a torch.amp.GradScaler, got NoneType"),
        (
            lambda: agree_on_overflow(GradScaler("cpu"), DistributedOptimizer([torch.zeros(1)])),
            TypeError,
            "optimizer must be a torch.optim.Optimizer, got DistributedOptimizer",
        ),
    ],
)
def test_bad_calls(call, error, message):
    with raises(error, match=message):
        call()


def reduce_all():
    rank, size = net.get_world_rank(), net.get_world_size()
    model = nn.ParameterList(
        [
            *(nn.Parameter(torch.zeros(3, dtype=dtype)) for dtype in (torch.float64, torch.bfloat16, torch.float64)),
            *(nn.Parameter(torch.zeros(2, 3)) for _ in range(4)),
        ]
    )
    some, half, strided, sole, never, frozen, expert = model
    expert._tutel_expert = True
    frozen.requires_grad_(False)
    found = []
    for average in (False, True):
        some.grad = torch.full((3,), rank + 1.0, dtype=torch.float64)
        half.grad = torch.full((3,), 2.0**-8 if rank else 1.0, dtype=torch.bfloat16)
        strided.grad = torch.arange(6.0, dtype=torch.float64)[::2] * (rank + 1)
        sole.grad = torch.full((2, 3), 6.0) if rank == 1 else None
        expert.grad = torch.full((2, 3), float(rank))
        reduce_shared_gradients(model, average=average)
        assert never.grad is None
        assert frozen.grad is None
        assert (expert.grad == rank).all()
        found.append([parameter.grad.clone() for parameter in (some, half, strided, sole)])
    ranks = size * (size + 1) / 2
    assert found[0][0].tolist() == [ranks] * 3
    # Added in bf16, each small term would be lost.
    assert torch.equal(found[0][1], torch.full((3,), 1 + (size - 1) * 2.0**-8, dtype=torch.bfloat16))
    assert found[0][2].tolist() == [0.0, 2 * ranks, 4 * ranks]
    assert found[0][3].tolist() == [[6.0] * 3] * 2
    assert found[1][0].tolist() == [ranks / size] * 3
    torch.testing.assert_close(found[1][3], torch.full((2, 3), 6.0 / size))


@mark.parametrize("world_size", [2, 3])
def test_shared_gradients_are_summed(world_size):
    run_ranks(reduce_all, world_size)


def test_experts_are_ignored_under_their_full_names():
    layer = moe.moe_layer({"k": 1}, 4, {"count_per_node": 2, "hidden_size_per_expert": 3})
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(layer))
    model._ddp_params_and_buffers_to_ignore = ["0.bias"]
    assert ignore_experts(model) is model
    ignored = model._ddp_params_and_buffers_to_ignore
    assert ignored[0] == "0.bias"
    assert set(ignored[1:]) == {f"1.0.experts.batched_fc{i}_{kind}" for i in (1, 2) for kind in ("w", "bias")}


def make_model():
    torch.manual_seed(2)
    layer = moe.moe_layer(
        {"k": 2, "capacity_factor": 0}, 6, {"count_per_node": 1, "hidden_size_per_expert": 5},
        seeds=(1, net.get_world_rank() + 1, 1),
    )  # fmt: skip
    return nn.Sequential(nn.Linear(6, 6), layer, nn.Linear(6, 2)).double()


def compute(model, x):
    model(x).square().sum().backward()


def wrap():
    """Sum by hand, DDP and FSDP2 agree on gradients, and on their norm."""
    from torch.distributed.fsdp import fully_shard

    rank, size = net.get_world_rank(), net.get_world_size()
    x = torch.randn(7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
    plain = make_model()
    wrapped = nn.parallel.DistributedDataParallel(ignore_experts(copy.deepcopy(plain)))
    sharded = copy.deepcopy(plain)
    for part in (sharded[0], sharded[2]):
        fully_shard(part)
    for model in (plain, wrapped, sharded):
        compute(model, x)
    reduce_shared_gradients(plain, average=True)
    reduce_shared_gradients(sharded[1], average=True)  # the gate, which is not sharded here
    experts = 0
    for (name, ours), theirs in zip(plain.named_parameters(), wrapped.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-12, msg=name)
        experts += ours.numel() if getattr(ours, "_tutel_expert", False) else 0
    assert experts == 5 * 6 * 2 + 5 + 6
    assert all(hasattr(parameter, "full_tensor") for parameter in sharded[0].parameters())
    norms = [clip_grad_norm(model, 0.1) for model in (plain, wrapped, sharded)]
    assert norms[0] > 0.1
    for norm in norms[1:]:
        torch.testing.assert_close(norm, norms[0], rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(plain.parameters(), sharded.parameters(), strict=True):
        whole = theirs.grad.full_tensor() if hasattr(theirs.grad, "full_tensor") else theirs.grad
        torch.testing.assert_close(ours.grad, whole, rtol=1e-12, atol=1e-12)
    assert size > 1
    return norms[0].item()


def test_ddp_and_fully_sharded_models_beside_a_sum_by_hand():
    norms = run_ranks(wrap, 2)
    assert norms[0] == norms[1]
