"""The dispatcher, fast_encode and fast_decode against one-hot products: values, every gradient, dropped choices."""

import pytest
import torch
from reference import DTYPES, accumulator, assert_close, assert_same_bits, exact_values, leaves, random_values, wide
from tutel.impls import fast_dispatch

from tutel import moe

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
postscore = pytest.mark.parametrize("is_postscore", [True, False])
NUM_EXPERTS, WIDTH = 5, 7


def choices(num_tokens, top_k, *, seed=0):
    """Ids [T, K] with some -1, and the slots [T, K] that a running count of their one-hot mask gives."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, NUM_EXPERTS, (num_tokens, top_k), generator=generator)
    first_to_last = ids.T.reshape(-1)
    mask = (first_to_last[:, None] == torch.arange(NUM_EXPERTS)).long()
    slots = ((mask.cumsum(0) - 1) * mask).sum(1).reshape(top_k, num_tokens).T
    return ids, slots


def one_hot(ids, slots, capacity, num_experts=NUM_EXPERTS):
    """[T, K, E * C]: 1 at the row of a choice."""
    rows = torch.arange(num_experts * capacity)
    kept = (ids >= 0) & (slots >= 0) & (slots < capacity)
    return kept[..., None] & ((ids * capacity + slots)[..., None] == rows)


def naive_encode(x, gates, mask, *, weigh):
    factors = mask.to(accumulator(x.dtype)) * (wide(torch.stack(gates, 1))[..., None] if weigh else 1)
    return torch.einsum("tkr,td->rd", factors, wide(x)).to(x.dtype)


def naive_decode(y, gates, mask, *, weigh):
    factors = mask.to(accumulator(y.dtype)) * (wide(torch.stack(gates, 1))[..., None] if weigh else 1)
    return torch.einsum("tkr,rd->td", factors, wide(y)).to(y.dtype)


def columns(choices):
    return list(choices.unbind(1))


def dispatcher_of(ids, slots, gates, capacity, dtype, *, is_postscore=True, width=WIDTH):
    dispatcher = moe.fast_dispatcher(NUM_EXPERTS, capacity, width, dispatch_dtype=dtype)
    dispatcher.update(columns(ids), columns(slots), gates, is_postscore=is_postscore)
    return dispatcher


def compare(what, ours, naive, value, gates):
    """Compare values and the gradients of the value and of each gate with the naive twin's and with fp64's."""
    results = []
    for function, cast in ((ours, None), (naive, None), (naive, torch.float64)):
        arguments = leaves(
            value if cast is None else value.to(cast), *(g if cast is None else g.to(cast) for g in gates)
        )
        output = function(arguments[0], arguments[1:])
        output.backward(exact_values(output.shape, output.dtype, seed=77))
        zeros = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in arguments]
        results.append([output.detach(), *zeros])
    for name, *three in zip([what, "value's gradient", *["gate's gradient"] * len(gates)], *results, strict=True):
        assert_close(f"{what}: {name}", *three)


@dtypes
@postscore
@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
@pytest.mark.parametrize(("num_tokens", "capacity"), [(23, 3), (23, 40), (1, 1), (0, 2), (9, 0)])
def test_dispatcher(dtype, is_postscore, top_k, num_tokens, capacity):
    ids, slots = choices(num_tokens, top_k)
    mask = one_hot(ids, slots, capacity)
    gates = [random_values((num_tokens,), accumulator(dtype), seed=j) for j in range(top_k)]
    compare(
        "encode",
        lambda x, gates: dispatcher_of(ids, slots, gates, capacity, dtype, is_postscore=is_postscore).encode(x),
        lambda x, gates: naive_encode(x, gates, mask, weigh=not is_postscore),
        random_values((num_tokens, WIDTH), dtype, seed=10),
        gates,
    )
    compare(
        "decode",
        lambda y, gates: dispatcher_of(ids, slots, gates, capacity, dtype, is_postscore=is_postscore).decode(y),
        lambda y, gates: naive_decode(y, gates, mask, weigh=is_postscore),
        random_values((NUM_EXPERTS * capacity, WIDTH), dtype, seed=11),
        gates,
    )


@dtypes
@postscore
def test_choices_that_claim_one_slot_are_added_up(dtype, is_postscore):
    ids = torch.tensor([[0, 1], [0, -1], [0, 1], [2, 2]])
    slots = torch.tensor([[0, 0], [0, 0], [1, 0], [0, 0]])
    mask = one_hot(ids, slots, 2)
    gates = [random_values((4,), accumulator(dtype), seed=j) for j in range(2)]
    compare(
        "encode",
        lambda x, gates: dispatcher_of(ids, slots, gates, 2, dtype, is_postscore=is_postscore).encode(x),
        lambda x, gates: naive_encode(x, gates, mask, weigh=not is_postscore),
        random_values((4, WIDTH), dtype, seed=10),
        gates,
    )
    compare(
        "decode",
        lambda y, gates: dispatcher_of(ids, slots, gates, 2, dtype, is_postscore=is_postscore).decode(y),
        lambda y, gates: naive_decode(y, gates, mask, weigh=is_postscore),
        random_values((NUM_EXPERTS * 2, WIDTH), dtype, seed=11),
        gates,
    )


def test_by_hand():
    dispatcher = moe.fast_dispatcher(2, 2, 2, torch.float32)
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]])
    # Token 2 finds no slot (2 is not below C = 2); token 3 chose nobody.
    dispatcher.update([torch.tensor([1, 1, 1, -1])], [torch.tensor([1, 0, 2, 0])], [torch.tensor([0.5, 2.0, 3.0, 4.0])])
    assert dispatcher.encode(x).tolist() == [[0, 0], [0, 0], [3, 4], [1, 2]]
    y = torch.tensor([[9.0, 9.0], [9.0, 9.0], [10.0, 20.0], [30.0, 40.0]])
    expected = [[15, 20], [20, 40], [0, 0], [0, 0]]
    assert dispatcher.decode(y).tolist() == expected
    assert dispatcher.decode(y.view(2, 2, 2)).tolist() == expected
    dispatcher.update(*([c] for c in map(torch.tensor, ([1, 0], [0, 1], [0.5, 2.0]))), is_postscore=False)
    assert dispatcher.encode(x[:2]).tolist() == [[0, 0], [6, 8], [0.5, 1], [0, 0]]
    assert dispatcher.decode(y).tolist() == [[10, 20], [9, 9]]


def test_reuse_while_tokens_and_capacity_change():
    dispatcher = moe.fast_dispatcher(NUM_EXPERTS, 4, WIDTH, torch.float64)
    kept = 4
    for num_tokens, capacity in [(12, None), (40, 9), (3, None), (0, 2), (17, 0), (30, torch.tensor(5)), (8, 1)]:
        ids, slots = choices(num_tokens, 2, seed=num_tokens)
        gates = [random_values((num_tokens,), seed=j) for j in range(2)]
        dispatcher.update(columns(ids), columns(slots), gates, capacity=capacity)
        kept = int(capacity or 0) or kept
        x, y = random_values((num_tokens, WIDTH)), random_values((NUM_EXPERTS * kept, WIDTH))
        mask = one_hot(ids, slots, kept)
        rows = dispatcher.encode(x)
        assert rows.shape == (NUM_EXPERTS * kept, WIDTH)
        assert rows.is_contiguous()
        assert dispatcher.capacity == kept
        torch.testing.assert_close(rows, naive_encode(x, gates, mask, weigh=False))
        torch.testing.assert_close(dispatcher.decode(y), naive_decode(y, gates, mask, weigh=True))


@pytest.mark.parametrize("given", [torch.float64, torch.float32, torch.bfloat16])
@dtypes
def test_result_is_in_the_dispatch_dtype(given, dtype):
    ids, slots = choices(9, 2)
    gates = [random_values((9,), given, seed=j) for j in range(2)]
    dispatcher = dispatcher_of(ids, slots, gates, 4, dtype)
    x, y = random_values((9, WIDTH), given), random_values((NUM_EXPERTS * 4, WIDTH), given)
    assert_same_bits(
        "encode", dispatcher.encode(x), naive_encode(x.to(dtype), gates, one_hot(ids, slots, 4), weigh=False)
    )
    assert dispatcher.decode(y).dtype == dtype


def test_fp64_is_not_rounded_to_fp32():
    value = 1 + 2.0**-40
    one, zero = torch.ones(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    dispatcher = moe.fast_dispatcher(2, 1, 1, torch.float64)
    dispatcher.update([one], [zero], [torch.tensor([value], dtype=torch.float64)])
    assert dispatcher.encode(torch.tensor([[value]], dtype=torch.float64))[1].item() == value
    assert dispatcher.decode(torch.tensor([[0], [1]], dtype=torch.float64)).item() == value


@pytest.mark.parametrize("integers", [torch.int64, torch.int32, torch.int16, torch.int8])
def test_integers_of_any_width_and_columns_of_any_shape(integers):
    ids, slots = choices(9, 2)
    gates = [random_values((9, 1), torch.float32, seed=j) for j in range(2)]
    dispatcher = moe.fast_dispatcher(NUM_EXPERTS, 4, WIDTH, torch.float32)
    dispatcher.update(*([c.to(integers)[:, None] for c in columns(choice)] for choice in (ids, slots)), gates)
    x = random_values((3, 3, WIDTH), torch.float32)
    expected = naive_encode(x.reshape(9, WIDTH), [g[:, 0] for g in gates], one_hot(ids, slots, 4), weigh=False)
    assert_same_bits("encode", dispatcher.encode(x.transpose(0, 1).contiguous().transpose(0, 1)), expected)


def test_slots_and_ids_beyond_int32_do_not_wrap_around():
    zero, gate = torch.zeros(1, dtype=torch.int64), torch.ones(1)
    dispatcher = moe.fast_dispatcher(2, 1, 1, torch.float32)
    dispatcher.update([zero], [zero + 2**32], [gate])
    assert dispatcher.encode(torch.ones(1, 1)).tolist() == [[0], [0]]
    with pytest.raises(RuntimeError, match="topk_ids"):
        dispatcher.update([zero + 2**32], [zero], [gate])


@postscore
def test_gradcheck_of_the_dispatcher(is_postscore):
    ids, slots = choices(6, 2)
    x, y, *gates = leaves(*(random_values(s, seed=i) for i, s in enumerate([(6, 3), (NUM_EXPERTS * 2, 3), (6,), (6,)])))

    def encode(x, *gates):
        return dispatcher_of(ids, slots, list(gates), 2, torch.float64, is_postscore=is_postscore, width=3).encode(x)

    def decode(y, *gates):
        return dispatcher_of(ids, slots, list(gates), 2, torch.float64, is_postscore=is_postscore, width=3).decode(y)

    assert torch.autograd.gradcheck(encode, (x, *gates))
    assert torch.autograd.gradcheck(decode, (y, *gates))


@pytest.mark.parametrize("normalize_gate", [True, False])
@postscore
def test_gradcheck_from_scores(is_postscore, normalize_gate):
    scores, x, scale = leaves(
        torch.softmax(random_values((6, 4), seed=1), 1), random_values((6, 3), seed=2), random_values((4, 1, 3), seed=3)
    )

    def whole(scores, x, scale):
        critical, loss = moe.top_k_routing(scores, 2, normalize_gate=normalize_gate, capacity_factor=0.75)
        rows = moe.fast_encode(x, critical, is_postscore)
        return moe.fast_decode((rows * scale).square(), critical, is_postscore), loss

    assert torch.autograd.gradcheck(whole, (scores, x, scale))


@dtypes
@postscore
@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
def test_encode_and_decode_of_a_plan(dtype, is_postscore, top_k):
    scores = torch.softmax(random_values((23, NUM_EXPERTS), seed=3), 1).to(accumulator(dtype))
    critical, _ = moe.top_k_routing(scores, top_k, capacity_factor=0.5)
    ids, slots = (torch.stack(critical[i], 1) for i in (1, 2))
    capacity = critical[4]
    mask = one_hot(ids, slots, capacity)
    assert mask.sum() < ids.numel(), "nothing is dropped: the example is too easy"

    def plan(gates):
        return (*critical[:3], gates, *critical[4:])

    compare(
        "fast_encode",
        lambda x, gates: moe.fast_encode(x, plan(gates), is_postscore),
        lambda x, gates: naive_encode(x, gates, mask, weigh=not is_postscore).view(NUM_EXPERTS, capacity, WIDTH),
        random_values((23, WIDTH), dtype, seed=10),
        critical[3],
    )
    for shape in [(NUM_EXPERTS, capacity, WIDTH), (NUM_EXPERTS * capacity, WIDTH)]:
        compare(
            "fast_decode",
            lambda y, gates: moe.fast_decode(y, plan(gates), is_postscore),
            lambda y, gates: naive_decode(y.reshape(-1, WIDTH), gates, mask, weigh=is_postscore),
            random_values(shape, dtype, seed=11),
            critical[3],
        )


def test_another_width_comes_back():
    critical, _ = moe.top_k_routing(torch.softmax(random_values((9, 4)), 1), 2)
    assert moe.fast_decode(torch.ones(4, critical[4], 11), critical).shape == (9, 11)


def test_plan_with_no_slots():
    critical, _ = moe.top_k_routing(torch.softmax(random_values((2, 4)), 1), 1, capacity_factor=0.5)
    assert critical[4] == 0
    rows = moe.fast_encode(torch.ones(2, 3), critical)
    assert rows.shape == (4, 0, 3)
    assert moe.fast_decode(rows, critical).tolist() == [[0] * 3] * 2
    assert moe.get_reversed_sample_ids(critical).shape == (4, 0)


@postscore
def test_compiles_whole(is_postscore):
    torch._dynamo.reset()
    ids, slots = choices(11, 2)
    x, y, *gates = leaves(
        *(random_values(s, seed=i) for i, s in enumerate([(11, 3), (NUM_EXPERTS * 2, 3), (11,), (11,)]))
    )

    def both(x, y, gates):
        dispatcher = dispatcher_of(ids, slots, gates, 2, torch.float64, is_postscore=is_postscore, width=3)
        return dispatcher.encode(x), dispatcher.decode(y)

    def planned(scores, x):
        critical, loss = moe.top_k_routing(scores, 2, capacity_factor=1.25)
        return moe.fast_decode(moe.fast_encode(x, critical, is_postscore).sin(), critical, is_postscore), loss

    scores = torch.softmax(random_values((11, NUM_EXPERTS), seed=9), 1).requires_grad_()
    for function, arguments, inputs in ((both, (x, y, gates), [x, y, *gates]), (planned, (scores, x), [scores, x])):
        results = []
        for version in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
            outputs = version(*arguments)
            gradients = torch.autograd.grad(sum(output.square().sum() for output in outputs), inputs)
            results.append([*outputs, *gradients])
        torch.testing.assert_close(results[1], results[0])
    torch._dynamo.reset()


def test_compiles_for_changing_sizes():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def planned(scores, x):
        critical, loss = moe.top_k_routing(scores, 2)
        return moe.fast_decode(moe.fast_encode(x, critical), critical), loss

    for num_tokens in (5, 7, 9, 3, 20, 40, 2):
        scores, x = torch.softmax(random_values((num_tokens, 4)), 1), random_values((num_tokens, 3))
        torch.testing.assert_close(planned(scores, x), planned.__wrapped__(scores, x))
    assert counter.frame_count <= 2
    torch._dynamo.reset()


def test_one_object_under_both_names():
    assert fast_dispatch.TutelMoeFastDispatcher is moe.fast_dispatcher
    assert moe.top_k_routing is moe.extract_critical is fast_dispatch.extract_critical
