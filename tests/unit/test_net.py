"""tutel.net in one process: results, shapes, gradients and errors. tests/distributed has it over several."""

import torch
import torch.distributed
import tutel.impls.communicate
from pytest import fixture, mark, raises

from tutel import net


@fixture
def two_ranks():
    """A process group that says it has two ranks; nothing can be sent through it."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    torch.distributed.destroy_process_group()


@fixture
def one_rank(tmp_path):
    """A real process group of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def tokens(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


X = torch.arange(12.0).reshape(4, 3)

#: Every collective that takes a tensor, as a function of it.
SIMPLE = {
    "simple_broadcast": lambda x: net.simple_broadcast(x, 0),
    "simple_all_reduce": net.simple_all_reduce,
    "simple_all_to_all": net.simple_all_to_all,
    "simple_split": net.simple_split,
    "simple_reduce_scatter": net.simple_reduce_scatter,
    "simple_all_gather": net.simple_all_gather,
}
DIFFERENTIABLE = {
    "all_to_all": lambda x: net.all_to_all(x, 1, 0),
    "all_to_all_back": lambda x: net.all_to_all(x, 0, 1, use_2dh=True),
    "all_to_all_background": lambda x: net.all_to_all(x, 1, 0, background=True)(),
    "all_to_all_single": net.all_to_all_single,
    "all_gather": lambda x: net.all_gather(x, 1),
    "reduce_scatter": lambda x: net.reduce_scatter(x, -1),
    "spatial_split": lambda x: net.spatial_split(x, 0),
    "allreduce_forward": net.allreduce_forward,
    "allreduce_backward": net.allreduce_backward,
    "zero_gather": net.zero_gather,
    "zero_scatter": lambda x: net.zero_scatter(x, lambda flat, group: flat)[0].reshape(x.shape),
    "batch_all_to_all_v": lambda x: net.batch_all_to_all_v([x], [x.numel()])[0][0],
    "batch_all_gather_v": lambda x: net.batch_all_gather_v([x])[0][0].reshape(x.shape),
}


@mark.parametrize("name", SIMPLE)
def test_simple_collectives_are_the_identity_without_gradient(name):
    output = SIMPLE[name](X)
    assert torch.equal(output, X)
    assert output.is_contiguous()
    if name != "simple_broadcast":  # which is in place
        assert not SIMPLE[name](tokens(4, 3)).requires_grad


@mark.parametrize("name", DIFFERENTIABLE)
def test_collectives_are_the_identity_with_gradient(name):
    assert torch.equal(DIFFERENTIABLE[name](X), X)
    assert torch.autograd.gradcheck(DIFFERENTIABLE[name], [tokens(4, 3)])
    assert torch.autograd.gradgradcheck(DIFFERENTIABLE[name], [tokens(4, 3)])


@mark.parametrize("name", [*SIMPLE, *DIFFERENTIABLE])
def test_a_group_of_one_process_changes_nothing(name, one_rank):
    assert torch.equal({**SIMPLE, **DIFFERENTIABLE}[name](X), X)


def test_size_and_rank(one_rank):
    assert (net.get_world_size(), net.get_world_rank()) == (1, 0)
    assert net.get_world_size(torch.distributed.group.WORLD) == 1
    net.barrier()


def test_size_and_rank_of_several(two_ranks):
    assert (net.get_world_size(), net.get_world_rank()) == (2, 0)


def test_size_and_rank_without_process_group():
    assert (net.get_world_size(), net.get_world_rank()) == (1, 0)
    net.barrier()
    with raises(ValueError, match=r"torch\.distributed is not initialised"):
        net.get_world_size(torch.distributed.ProcessGroup(torch.distributed.HashStore(), 0, 1))
    with raises(TypeError, match=r"group must be a process group of torch\.distributed or None, got object$"):
        net.get_world_size(object())


def test_a_process_group_that_breaks_is_no_world_of_one(monkeypatch, one_rank):
    def broken(group=None):
        raise RuntimeError("the library is missing")

    monkeypatch.setattr(torch.distributed, "get_world_size", broken)
    with raises(RuntimeError, match="the library is missing"):
        net.get_world_size()


def test_all_reduce_in_place():
    x = X.clone()
    assert net.simple_all_reduce(x, inplace=True) is x
    assert net.simple_broadcast(x, src=0) is x
    assert torch.equal(net.simple_all_reduce(x, None, torch.distributed.ReduceOp.MAX), X)


def test_all_to_all_in_the_background_gives_a_wait():
    output, wait = net.simple_all_to_all(X.T, background=True)
    wait()
    assert torch.equal(output, X.T)
    assert output.is_contiguous()


def test_gathering_numbers_makes_a_vector():
    assert net.simple_all_gather(torch.tensor(3.0)).tolist() == [3.0]


def test_zero_gather_cuts_the_padding_off():
    x = tokens(7)
    whole = net.zero_gather(x, full_shape=[2, 3])
    assert torch.equal(whole, x[:6].reshape(2, 3))
    whole.sum().backward()
    assert x.grad.tolist() == [1.0] * 6 + [0.0]
    with raises(ValueError, match=r"\[3, 3\] has 9 elements, but the ranks' parts have 7"):
        net.zero_gather(x, [3, 3])


@mark.parametrize("scatter", [net.simple_split, net.simple_reduce_scatter])
def test_zero_scatter_and_back(scatter):
    part, shape = net.zero_scatter(X, scatter)
    assert part.shape == (12,)
    assert torch.equal(net.zero_gather(part, shape), X)


@mark.parametrize("sizes", [[12], torch.tensor([12], dtype=torch.int32)])
def test_batch_all_to_all_v(sizes):
    ids = torch.arange(12)
    (rows, numbers), received = net.batch_all_to_all_v([X, ids], sizes)
    assert torch.equal(rows, X)
    assert torch.equal(numbers, ids)
    assert received.tolist() == [12]
    assert received.dtype == torch.int64
    assert net.batch_all_to_all_v([ids], [5])[0][0].tolist() == [0, 1, 2, 3, 4]


def test_batch_all_gather_v():
    (flat, numbers), sizes = net.batch_all_gather_v((X, torch.arange(12)))
    assert flat.shape == numbers.shape == (12,)
    assert sizes.tolist() == [12]
    assert sizes.dtype == torch.int64


def test_groups_of_one_process():
    groups = net.create_groups_from_world(group_count=1)
    assert net.create_groups_from_world(-1) is groups
    assert (groups.global_rank, groups.global_size, groups.group_count) == (0, 1, 1)
    assert (groups.data_rank, groups.model_rank, groups.model_size) == (0, 0, 1)
    assert groups.data_group is groups.model_group is groups.global_group is None
    assert not groups.is_distributed
    assert net.create_standalone_group() is None


def test_groups_of_a_process_group(one_rank):
    world = torch.distributed.group.WORLD
    groups = net.create_groups_from_world(1, parent_group=world)
    assert groups.is_distributed
    assert groups.model_group is world
    assert net.create_groups_from_world(1, parent_group=world) is groups
    assert net.create_groups_from_world(1) is not groups


BAD_CALLS = {
    "no tensor": (lambda: net.all_gather([1.0], 0), TypeError, "all_gather: input must be a torch.Tensor, got list"),
    "dimension": (lambda: net.all_to_all(X, 2, 0), ValueError, r"no dimension 2, its shape is \[4, 3\]"),
    "dimension's type": (lambda: net.all_gather(X, 0.5), TypeError, "a dimension must be an integer, got 0.5"),
    "number": (lambda: net.simple_split(torch.tensor(1.0)), ValueError, r"no dimension 0, its shape is \[\]"),
    "source": (lambda: net.simple_broadcast(X, 1), ValueError, r"src must be below the number of ranks \(1\), got 1"),
    "operation": (lambda: net.simple_all_reduce(X, op="sum"), TypeError, "op must be a torch.distributed.ReduceOp"),
    "one for a list": (lambda: net.batch_all_gather_v(X), TypeError, "datas must be a list of at least one"),
    "empty list": (lambda: net.batch_all_to_all_v([], [1]), TypeError, "datas must be a list of at least one"),
    "sizes": (lambda: net.batch_all_to_all_v([X], [6, 6]), ValueError, r"one size a rank \(\[1\]\), got shape \[2\]"),
    "too large": (lambda: net.batch_all_to_all_v([X], [13]), ValueError, r"elements \(12\), got 13"),
    "negative": (lambda: net.batch_all_to_all_v([X], [-1]), ValueError, r"elements \(12\), got -1"),
    "unequal": (lambda: net.batch_all_gather_v([X, X[0]]), ValueError, r"same number of elements, got \[3, 12\]"),
    "two groups": (lambda: net.create_groups_from_world(2), ValueError, r"divide the number of ranks \(1\).* got 2"),
    "no groups": (lambda: net.create_groups_from_world(0), ValueError, "got 0"),
    "groups of two": (lambda: net.create_groups_from_world(-2), ValueError, "got -2"),
    "half a group": (lambda: net.create_groups_from_world(0.5), TypeError, "group_count must be an integer, got 0.5"),
    "backend": (lambda: net.create_groups_from_world(1, "tcp"), ValueError, "one of nccl, gloo, mpi, got 'tcp'"),
    "no parameters": (lambda: net.TutelDistributedOptimizer([]), ValueError, "at least one parameter, got none"),
    "no parameter": (lambda: net.TutelDistributedOptimizer([1]), TypeError, "params must be parameters, or dicts"),
    "too early": (lambda: net.TutelDistributedOptimizer([X]).step(), RuntimeError, "there is no optimizer yet"),
}


INDIVISIBLE = {
    "all_to_all": lambda: net.all_to_all(X, 0, 1),
    "all_to_all_single": lambda: net.all_to_all_single(X[1:]),
    "reduce_scatter": lambda: net.reduce_scatter(X, -1),
    "spatial_split": lambda: net.spatial_split(X, 1),
    "simple_split": lambda: net.simple_split(X[1:]),
    "simple_all_to_all": lambda: net.simple_all_to_all(X[1:]),
    "simple_reduce_scatter": lambda: net.simple_reduce_scatter(X[1:]),
}


@mark.parametrize("name", INDIVISIBLE)
def test_what_two_ranks_cannot_divide(name, two_ranks):
    with raises(ValueError, match=rf"^{name}: the number of ranks \(2\) must divide dimension -?[01] of input"):
        INDIVISIBLE[name]()


def test_bad_calls_of_two_ranks(two_ranks):
    with raises(ValueError, match=r"src must be below the number of ranks \(2\), got 2"):
        net.simple_broadcast(X, 2)
    with raises(ValueError, match=r"one size a rank \(\[2\]\), got shape \[1\]"):
        net.batch_all_to_all_v([X], [12])
    with raises(ValueError, match=r"elements \(12\), got \[6, 7\]"):
        net.batch_all_to_all_v([X], [6, 7])
    with raises(ValueError, match=r"\[9, 3\] has 27 elements, but the ranks' parts have 24"):
        net.zero_gather(X, [9, 3])
    with raises(ValueError, match=r"group_count must divide the number of ranks \(2\)"):
        net.create_groups_from_world(3)


@mark.parametrize("name", BAD_CALLS)
def test_bad_calls(name):
    call, error, message = BAD_CALLS[name]
    with raises(error, match=message):
        call()


def make_parameters():
    torch.manual_seed(3)
    shared, expert = torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)
    for parameter in expert.parameters():
        parameter._tutel_expert = True
    return torch.nn.Sequential(shared, expert)


@mark.parametrize("average_shared", [False, True])
def test_optimizer_of_one_process_is_the_local_one(average_shared):
    ours, theirs = make_parameters(), make_parameters()
    optimizer = net.TutelDistributedOptimizer(ours.parameters(), group=None, average_shared=average_shared)
    assert optimizer.warp_local(torch.optim.AdamW, lr=0.1) is optimizer
    plain = torch.optim.AdamW(theirs.parameters(), lr=0.1)
    for _ in range(3):
        for model, step in ((ours, optimizer), (theirs, plain)):
            step.zero_grad()
            model(X).square().sum().backward()
            step.step()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_optimizer_keeps_experts_apart_and_options_with_their_group():
    model = make_parameters()
    groups = [{"params": [model[0].weight, model[1].weight], "lr": 0.5}, {"params": model[1].bias}]
    optimizer = net.TutelDistributedOptimizer(groups).warp_local(torch.optim.SGD, 0.25)
    members = [(group["params"], group["lr"]) for group in optimizer.param_groups]
    expected = [([model[0].weight], 0.5), ([model[1].weight], 0.5), ([model[1].bias], 0.25)]
    assert [([id(p) for p in params], lr) for params, lr in members] == [
        ([id(p) for p in params], lr) for params, lr in expected
    ]
    assert isinstance(optimizer.local_optim, torch.optim.SGD)


def test_optimizer_closure_and_state():
    model = make_parameters()
    optimizer = net.TutelDistributedOptimizer(model.parameters()).warp_local(torch.optim.Adam)
    model(X).sum().backward()
    assert optimizer.step(lambda: 3.0) == 3.0
    again = net.TutelDistributedOptimizer(make_parameters().parameters()).warp_local(torch.optim.Adam)
    again.load_state_dict(optimizer.state_dict())
    assert len(again.state_dict()["state"]) == 4
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_historic_path_has_the_same_objects():
    assert tutel.impls.communicate.__all__ == net.__all__
    assert all(getattr(tutel.impls.communicate, name) is getattr(net, name) for name in net.__all__)
