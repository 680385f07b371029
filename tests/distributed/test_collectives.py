"""Collectives over W ranks: values, first and second gradients, against one process that holds all ranks' tensors."""

import torch
from pytest import mark
from ranks import end_ranks, run_ranks
from torch import distributed
from tutel.distributed import transport
from tutel.distributed.gathering import scatter_sums

from tutel import net

#: Nodes of two ranks, as the launcher would say it.
NODES_OF_TWO = {"LOCAL_WORLD_SIZE": "2"}


def values(rank, shape, salt=0):
    generator = torch.Generator().manual_seed(100 * salt + rank)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


# Each case: (shape of a rank's input for W ranks, the collective, the same on the list of all ranks' inputs).


def joined(parts, dim):
    return [torch.cat(parts, dim)] * len(parts)


def scattered(wholes, dim):
    return list(sum(wholes).chunk(len(wholes), dim))


def exchanged(wholes, joined_dim, divided_dim):
    size = len(wholes)
    pieces = [whole.chunk(size, divided_dim) for whole in wholes]
    return [torch.cat([pieces[source][rank] for source in range(size)], joined_dim) for rank in range(size)]


def gathered_flat(parts, shape):
    whole = torch.cat([part.reshape(-1) for part in parts])
    return [whole[: shape.numel()].reshape(shape)] * len(parts)


CASES = {
    "all_to_all": (lambda w: (2 * w, 3, 2), lambda x: net.all_to_all(x, 1, 0), lambda xs: exchanged(xs, 1, 0)),
    "all_to_all back": (lambda w: (2, 3 * w, 2), lambda x: net.all_to_all(x, 0, 1), lambda xs: exchanged(xs, 0, 1)),
    "all_to_all from the end": (
        lambda w: (2, 3, 2 * w), lambda x: net.all_to_all(x, -2, -1), lambda xs: exchanged(xs, 1, 2)
    ),
    "all_to_all in one dimension": (
        lambda w: (2, 2 * w), lambda x: net.all_to_all(x, 1, 1), lambda xs: exchanged(xs, 1, 1)
    ),
    "all_to_all in nodes": (
        lambda w: (2 * w, 3, 2), lambda x: net.all_to_all(x, 1, 0, use_2dh=True), lambda xs: exchanged(xs, 1, 0)
    ),
    "all_to_all of columns": (
        lambda w: (3, 2 * w), lambda x: net.all_to_all(x.T, 1, 0), lambda xs: exchanged([x.T for x in xs], 1, 0)
    ),
    "all_to_all_single": (lambda w: (2 * w, 3), net.all_to_all_single, lambda xs: exchanged(xs, 0, 0)),
    "all_to_all_single of nothing": (lambda w: (0, 3), net.all_to_all_single, lambda xs: xs),
    "all_gather": (lambda w: (2, 3), net.all_gather, lambda xs: joined(xs, 0)),
    "all_gather of columns": (lambda w: (2, 3), lambda x: net.all_gather(x, -1), lambda xs: joined(xs, 1)),
    "reduce_scatter": (lambda w: (2 * w, 3), net.reduce_scatter, lambda xs: scattered(xs, 0)),
    "reduce_scatter of columns": (lambda w: (3, w), lambda x: net.reduce_scatter(x, 1), lambda xs: scattered(xs, 1)),
    "zero_gather": (lambda w: (2, 3), net.zero_gather, lambda xs: joined(xs, 0)),
    "zero_gather of numbers": (lambda w: (), net.zero_gather, lambda xs: [torch.stack(xs)] * len(xs)),
    "zero_gather with padding": (
        lambda w: (2, 3),
        lambda x: net.zero_gather(x, [net.get_world_size() * 3 - 1, 2]),
        lambda xs: gathered_flat(xs, torch.Size([len(xs) * 3 - 1, 2])),
    ),
}  # fmt: skip
BACKGROUND = {
    f"{name} in the background": (
        CASES["all_to_all"][0],
        lambda x, nodes=nodes: net.all_to_all(x, 1, 0, background=True, use_2dh=nodes)(),
        lambda xs: exchanged(xs, 1, 0),
    )
    for name, nodes in [("all_to_all", False), ("all_to_all in nodes", True)]
}
LINEAR = {**CASES, **BACKGROUND}


def derivatives(outputs, inputs, salt, twice):
    """Give the gradients of a loss that is not linear, and of those gradients."""
    loss = sum((output**3 * values(rank, output.shape, salt)).sum() for rank, output in outputs)
    first = torch.autograd.grad(loss, inputs, create_graph=twice)
    if not twice:
        return first, None
    curved = sum((grad * values(7, grad.shape, salt)).sum() for grad in first)
    return first, torch.autograd.grad(curved, inputs)


def compute_all():
    rank, size = net.get_world_rank(), net.get_world_size()
    found = {}
    for salt, (name, (shape, collective, _)) in enumerate(LINEAR.items()):
        x = values(rank, shape(size), salt).requires_grad_()
        output = collective(x)
        assert output.is_contiguous()
        first, second = derivatives([(rank, output)], [x], salt, twice=name not in BACKGROUND)
        found[name] = output.detach(), first[0].detach(), None if second is None else second[0]
    return found


@mark.parametrize("world_size", [2, 3, 4])
def test_values_and_gradients(world_size):
    results = run_ranks(compute_all, world_size, env=NODES_OF_TWO if world_size == 4 else None)
    for salt, (name, (shape, _, reference)) in enumerate(LINEAR.items()):
        xs = [values(rank, shape(world_size), salt).requires_grad_() for rank in range(world_size)]
        outputs = reference(xs)
        first, second = derivatives(list(enumerate(outputs)), xs, salt, twice=True)
        for rank, result in enumerate(results):
            for ours, theirs in zip(result[name], (outputs[rank], first[rank], second[rank]), strict=True):
                if ours is not None:
                    torch.testing.assert_close(
                        ours, theirs.detach(), rtol=1e-12, atol=1e-12, msg=f"{name}, rank {rank}"
                    )


def replicated():
    """Functions of what all ranks hold alike: their gradients are defined rank by rank."""
    rank, size = net.get_world_rank(), net.get_world_size()
    weights = [values(r, (2 * size, 3), salt=1) for r in range(size)]
    same = values(5, (2 * size, 3)).requires_grad_()

    part = net.spatial_split(same)
    (part**2 * weights[rank][:2]).sum().backward()
    pieces = same.detach().chunk(size)
    expected = torch.cat([2 * pieces[r] * weights[r][:2] for r in range(size)])
    torch.testing.assert_close(same.grad, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(part, pieces[rank])
    columns = net.spatial_split(same.T, 1)
    assert torch.equal(columns, pieces[rank].T)

    own = values(rank, (2, 3)).requires_grad_()
    total = net.allreduce_forward(own)
    (total**2).sum().backward()
    expected = sum(values(r, (2, 3)) for r in range(size))
    torch.testing.assert_close(total.detach(), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(own.grad, 2 * expected, rtol=1e-12, atol=1e-12)

    same = values(5, (2 * size, 3)).requires_grad_()
    output = net.allreduce_backward(same)
    assert torch.equal(output, same)
    (output**2 * weights[rank]).sum().backward()
    torch.testing.assert_close(same.grad, 2 * same.detach() * sum(weights), rtol=1e-12, atol=1e-12)


@mark.parametrize("world_size", [2, 3])
def test_gradients_of_what_all_ranks_hold(world_size):
    run_ranks(replicated, world_size)


def simple():
    rank, size = net.get_world_rank(), net.get_world_size()
    found = {}
    op = distributed.ReduceOp
    x = (torch.arange(2.0 * size * 3).reshape(2 * size, 3) + 100 * rank).requires_grad_()
    found["broadcast"] = net.simple_broadcast(x.detach().clone(), size - 1)
    columns = x.detach().clone().T
    assert net.simple_broadcast(columns, 0) is columns
    found["broadcast columns"] = columns
    found["sum"] = net.simple_all_reduce(x)
    found["max"] = net.simple_all_reduce(x, None, op.MAX)
    found["average"] = net.simple_all_reduce(x.T, op=op.AVG)
    inplace = x.detach().clone()
    assert net.simple_all_reduce(inplace, inplace=True) is inplace
    found["in place"] = inplace
    columns = x.detach().clone().T
    assert net.simple_all_reduce(columns, inplace=True) is columns
    found["columns in place"] = columns.T
    found["all_to_all"] = net.simple_all_to_all(x)
    output, wait = net.simple_all_to_all(x, background=True)
    wait()
    found["in the background"] = output
    found["split"] = net.simple_split(x)
    found["reduce_scatter"] = net.simple_reduce_scatter(x)
    found["smallest"] = net.simple_reduce_scatter(x, op=op.MIN)
    found["mean"] = net.simple_reduce_scatter(x, None, op.AVG)
    found["all_gather"] = net.simple_all_gather(x)
    found["numbers"] = net.simple_all_gather(torch.tensor(rank))
    for dtype in (torch.bool, torch.int16, torch.float8_e4m3fn, torch.complex64, torch.bfloat16):
        few = (torch.arange(size) + rank > 1).to(dtype)
        found[f"{dtype}"] = net.simple_all_gather(few), net.simple_all_to_all(few), net.simple_broadcast(few, 1)
    assert not any(torch.is_tensor(value) and value.requires_grad for value in found.values())
    return found


@mark.parametrize("world_size", [2, 3])
def test_simple_collectives(world_size):
    results = run_ranks(simple, world_size)
    size = world_size
    xs = [torch.arange(2.0 * size * 3).reshape(2 * size, 3) + 100 * rank for rank in range(size)]
    for rank, found in enumerate(results):
        kinds = {name: found.pop(name) for name in list(found) if name.startswith("torch.")}
        expected = {
            "broadcast": xs[-1], "broadcast columns": xs[0].T,
            "sum": sum(xs), "max": xs[-1], "average": sum(xs).T / size,
            "in place": sum(xs), "columns in place": sum(xs),
            "all_to_all": exchanged(xs, 0, 0)[rank], "in the background": exchanged(xs, 0, 0)[rank],
            "split": xs[rank].chunk(size)[rank],
            "reduce_scatter": scattered(xs, 0)[rank], "smallest": xs[0].chunk(size)[rank],
            "mean": scattered(xs, 0)[rank] / size,
            "all_gather": torch.cat(xs), "numbers": torch.arange(size),
        }  # fmt: skip
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, msg=f"{name}, rank {rank}")
        for name, (gathered, moved, sent) in kinds.items():
            dtype = getattr(torch, name.removeprefix("torch."))
            few = [(torch.arange(size) + r > 1).to(dtype) for r in range(size)]
            assert same_bits(gathered, few[0].new_tensor([]).new_empty(0), *few)
            assert same_bits(moved, *[each[rank : rank + 1] for each in few])
            assert same_bits(sent, few[1])


def same_bits(found, *parts):
    expected = torch.cat([part.reshape(-1).view(torch.uint8) for part in parts if part.numel()])
    return found.dtype == parts[-1].dtype and torch.equal(found.reshape(-1).view(torch.uint8), expected)


def halves(dtype):
    rank = net.get_world_rank()
    # In fp32 the small terms add up, in the half type each of them is lost.
    x = torch.full((net.get_world_size(), 2), torch.finfo(dtype).eps / 4 if rank else 1.0, dtype=dtype)
    results = [net.simple_all_reduce(x), net.simple_reduce_scatter(x), net.allreduce_forward(x), net.reduce_scatter(x)]
    results.append(scatter_sums(x, 1, None))
    transport.group_device = lambda _group: torch.device("cuda")  # as over NCCL: the backend sums, Gloo's own here
    return [*results, net.simple_reduce_scatter(x)]


@mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_of_half_types_are_rounded_once(dtype):
    small = torch.finfo(dtype).eps / 4
    for results in run_ranks(halves, 4, dtype):
        for total in results:
            assert torch.equal(total, torch.full_like(total, 1 + 3 * small))
            assert total.dtype == dtype


def ragged():
    rank, size = net.get_world_rank(), net.get_world_size()
    # Rank r sends (r + i) % 3 elements to rank i, so some send nothing.
    sizes = [(rank + i) % 3 for i in range(size)]
    total = sum(sizes)
    x = values(rank, (total + 2,)).requires_grad_()  # the last two go nowhere
    ids = 100 * rank + torch.arange(total, dtype=torch.int16)
    (data, numbers), received = net.batch_all_to_all_v([x, ids], torch.tensor(sizes))
    assert received.tolist() == [(rank + i) % 3 for i in range(size)]
    assert numbers.dtype == torch.int16
    (data * (rank + 1)).sum().backward()

    one = values(rank, (rank, 2), salt=3).requires_grad_()  # rank 0 gives nothing
    (both, flags), counts = net.batch_all_gather_v([one, one > 0])
    assert counts.tolist() == [2 * i for i in range(size)]
    assert torch.equal(flags, both > 0)
    (both * (rank + 1)).sum().backward()
    return x.detach(), data.detach(), numbers, x.grad, both.detach(), one.grad


@mark.parametrize("world_size", [2, 3, 4])
def test_ragged_exchanges(world_size):
    results = run_ranks(ragged, world_size)
    xs = [result[0] for result in results]
    pieces = [x[:-2].split([(r + i) % 3 for i in range(world_size)]) for r, x in enumerate(xs)]
    everything = torch.cat([values(r, (r, 2), salt=3).reshape(-1) for r in range(world_size)])
    for rank, (_, data, numbers, grad, both, one_grad) in enumerate(results):
        assert torch.equal(data, torch.cat([pieces[source][rank] for source in range(world_size)]))
        assert len(numbers) == len(data)
        assert numbers.tolist() == sorted(numbers.tolist())
        expected = [i + 1 for i in range(world_size) for _ in range((rank + i) % 3)] + [0, 0]
        assert grad.tolist() == expected
        assert torch.equal(both, everything)
        assert (one_grad == sum(range(1, world_size + 1))).all()


def scatter_and_gather():
    rank, size = net.get_world_rank(), net.get_world_size()
    x = values(3, (5, 3)).requires_grad_()  # 15 elements: padded for 2 and 4
    part, shape = net.zero_scatter(x, lambda flat, group: net.spatial_split(flat, 0, group))
    assert part.shape == (-(-15 // size),)
    whole = net.zero_gather(part, shape)
    assert torch.equal(whole, x)
    summed, _ = net.zero_scatter(x.detach(), net.simple_reduce_scatter)
    torch.testing.assert_close(net.zero_gather(summed, shape), size * x.detach())
    part, shape = net.zero_scatter(values(rank, (5, 3)), net.simple_split)
    return part


@mark.parametrize("world_size", [2, 3, 4])
def test_zero_scatter_pads(world_size):
    for rank, part in enumerate(run_ranks(scatter_and_gather, world_size)):
        each = len(part)
        padded = torch.cat([values(rank, (5, 3)).reshape(-1), torch.zeros(each * world_size - 15)])
        assert torch.equal(part, padded[rank * each :][:each])


def in_a_subgroup():
    """The odd ranks and the even ones, each among themselves."""
    rank = net.get_world_rank()
    group = net.create_groups_from_world(2).data_group
    x = values(rank, (4, 3)).requires_grad_()
    (net.all_gather(net.all_to_all(x, 1, 0, group), 0, group) ** 2).sum().backward()
    copied = net.simple_broadcast(torch.tensor([rank]), 1, group)
    return x.grad, copied.item(), net.get_world_rank(group)


def test_collectives_of_a_subgroup():
    results = run_ranks(in_a_subgroup, 4)
    for rank, (grad, copied, place) in enumerate(results):
        torch.testing.assert_close(grad, 2 * 2 * values(rank, (4, 3)), rtol=1e-12, atol=1e-12)
        assert copied == 2 + rank % 2
        assert place == rank // 2


def is_under_way():
    """The exchange goes on while this process does something else, also in the backward pass."""
    began, ended = [], []
    begin, land = transport.Flight.__init__, transport.Flight.land
    transport.Flight.__init__ = lambda self, name, *a, **k: (began.append(name), begin(self, name, *a, **k))[1]
    transport.Flight.land = lambda self: (ended.append(self._stage.name), land(self))[1]
    x = torch.ones(net.get_world_size(), 2, requires_grad=True)
    first = net.all_to_all(x, 1, 0, background=True)
    second = net.all_to_all(2 * x, 1, 0, background=True)
    assert (len(began), len(ended)) == (2, 0)
    (first() + second()).sum().backward()
    assert x.grad.tolist() == [[3.0, 3.0]] * net.get_world_size()
    names = ["all_to_all", "all_to_all", "gradient of all_to_all", "gradient of all_to_all"]
    assert began == ended == names


def test_background_exchanges_overlap():
    run_ranks(is_under_way, 2)


def differ(kind):
    rank = net.get_world_rank()
    if kind == "shape":
        net.all_to_all_single(torch.ones(4 if rank != 1 else 8, 3))
    if kind == "dtype":
        net.simple_all_gather(torch.ones(4, dtype=torch.float64 if rank == 2 else torch.float32))
    if kind == "call":
        net.all_gather(torch.ones(4)) if rank == 0 else net.allreduce_forward(torch.ones(4))
    if kind == "source":
        net.simple_broadcast(torch.ones(4), rank % 2)
    if kind == "number of tensors":
        net.batch_all_gather_v([torch.ones(4)] * (2 if rank == 1 else 1))


@mark.parametrize(
    ("kind", "message"),
    [
        ("shape", "rank 0 calls all_to_all_single of float32 [4, 3]; rank 1 calls all_to_all_single of float32 [8, 3]"),
        ("dtype", "rank 2 calls simple_all_gather of float64 [4]; rank 3 calls simple_all_gather of float32 [4]"),
        ("call", "the ranks differ: rank 0 calls "),
        ("source", "rank 0 calls simple_broadcast of float32 [4]; rank 1 calls simple_broadcast of float32 [4] with"),
        ("number of tensors", "rank 1 calls batch_all_gather_v of float32 [0] with [0, 2"),
    ],
)  # fmt: skip
def test_ranks_that_differ_are_named_on_every_rank(kind, message):
    for rank, end in enumerate(end_ranks(differ, 4, kind)):
        assert end.code == 1
        assert f"RankError: rank {rank}: " in end.output
        assert message in end.output
