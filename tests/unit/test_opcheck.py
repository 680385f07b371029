"""torch's own check of operators: schemas tell the truth, fake kernels give what real ones give, tracing works."""

import pytest
import torch
from reference import DTYPES, accumulator, random_values
from torch._subclasses.fake_tensor import FakeTensorMode

from tutel import functional  # noqa: F401  (registers the fake kernels)

ops = torch.ops.tutel
IDS = torch.tensor([[0, 1], [0, 2], [0, 1], [2, 0], [1, -1]], dtype=torch.int32)
_, _, _, OFFSETS, ROW_INDEX, ROW_CHOICE = ops.assign_rows(IDS, None, 4, 2)
SLOTS = ops.assign_rows(IDS, None, 4, -1)[0]


def calls(dtype):
    """Every operator, optional arguments both given and left out."""
    acc = accumulator(dtype)

    def some(*shape, dtype=dtype):
        return random_values(shape, dtype)

    chosen = IDS.clamp(min=0)
    yield from ((ops.select_experts, (some(5, 4), 2, softmax, True)) for softmax in (True, False))
    for grads in ((some(5, 2, dtype=acc), some(4, dtype=acc)), (None, some(4, dtype=acc)), (None, None)):
        yield ops.select_experts_backward, (some(5, 4), chosen, *grads, True, True)
    for priority in (None, some(5, dtype=acc)):
        yield ops.assign_rows, (IDS, priority, 4, 2)
    yield ops.assign_rows, (IDS, None, 4, -1)
    yield ops.padded_rows, (IDS, SLOTS, 4, 3)
    yield ops.prefix_count, (chosen, 0)
    yield ops.prefix_count, (chosen.to(torch.uint8), 1)
    for weights in (None, some(5, 2, dtype=acc)):
        yield ops.dispatch, (some(5, 3), ROW_CHOICE, weights, 2)
        yield ops.combine, (some(10, 3), ROW_INDEX, weights)
    yield ops.row_dot, (some(10, 3), ROW_INDEX, some(5, 3))
    for bias in (None, some(4, 2)):
        yield ops.grouped_gemm, (some(10, 3), some(4, 3, 2), bias, OFFSETS, False)
    yield ops.grouped_gemm, (some(10, 3), some(4, 2, 3), some(4, 2), OFFSETS, True)
    yield ops.grouped_gemm_pair, (some(10, 3), some(4, 3, 2), some(10, 3), some(4, 3, 2), OFFSETS, False)
    yield ops.grouped_gemm_weight_grad, (some(10, 3), some(10, 2), OFFSETS, None, None, 1)
    yield ops.grouped_gemm_weight_grad, (some(5, 3), some(10, 2), OFFSETS, ROW_CHOICE, None, 2)
    for save, value in ((True, some(4, 3, 2)), (True, None), (False, some(4, 3, 2))):
        arguments = (some(4, 3, 2), some(4, 2), value, OFFSETS, False, 0, save)
        yield ops.expert_hidden, (some(10, 3), None, 1, *arguments)
        yield ops.expert_hidden, (some(5, 3), ROW_CHOICE, 2, *arguments)
    saved = (some(10, 6), some(10, 6))
    yield ops.expert_hidden_grad, (some(10, 3), None, None, some(4, 6, 3), False, OFFSETS, 1, *saved, True)
    routed = (some(5, 3), ROW_CHOICE, some(5, 2, dtype=acc))
    yield ops.expert_hidden_grad, (*routed, some(4, 3, 6), True, OFFSETS, 1, saved[0], None, False)
    yield ops.grouped_sum, (some(10, 3), OFFSETS)


def names_of_calls():
    return {str(operator) for operator, _ in calls(torch.float32)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype):
    for operator, arguments in calls(dtype):
        torch.library.opcheck(operator, arguments)


def test_every_operator_is_in_the_list():
    registered = {
        name.partition(".")[0].replace("::", ".")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("tutel::")
    }
    assert registered == names_of_calls()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fake_kernels_agree_with_real_ones(dtype):
    for operator, arguments in calls(dtype):
        real = operator(*arguments)
        with FakeTensorMode() as mode:
            converted = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments]
            fake = operator(*converted)
        pairs = [(real, fake)] if isinstance(real, torch.Tensor) else zip(real, fake, strict=True)
        for expected, found in pairs:
            assert found.shape == expected.shape, operator
            assert found.dtype == expected.dtype, operator
            assert found.stride() == expected.stride(), operator


def test_raw_operators_have_no_gradient_and_torch_says_so():
    # The gradients belong to tutel.functional.
    rows = random_values((10, 3)).requires_grad_()
    with pytest.warns(UserWarning, match=r"tutel::combine: an autograd kernel was not registered"):
        ops.combine(rows, ROW_INDEX, None).sum().backward()
    assert rows.grad is None
