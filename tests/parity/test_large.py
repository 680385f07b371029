"""More than 2^31 elements: values beyond the boundary are exact. The large tensors are mostly copies or expansions."""

from pathlib import Path

import pytest
import torch
from tutel.functional import combine, dispatch, grouped_gemm, select_experts

BOUNDARY = 2**31


def need_memory(gibibytes):
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) / 2**20
    if free < gibibytes + 1:
        pytest.skip(f"needs {gibibytes} GiB of free memory, {free:.1f} are there")


@pytest.mark.slow
def test_dispatch_and_combine():
    need_memory(9)
    width = 2**21
    num_rows = BOUNDARY // width + 3
    tokens = torch.arange(1, 4).bfloat16()[:, None] * torch.ones(width, dtype=torch.bfloat16)
    tokens[:, -1] = torch.tensor([5, 7, 9])
    # All rows are copies of token 0, the last ones of tokens 1 and 2.
    choice = torch.zeros(num_rows, dtype=torch.int64)
    choice[-2], choice[-1] = 1, 2
    rows = torch.ops.tutel.dispatch(tokens, choice, None, 1)
    assert rows.numel() > BOUNDARY
    for row, token in ((0, 0), (num_rows - 3, 0), (num_rows - 2, 1), (num_rows - 1, 2)):
        assert torch.equal(rows[row], tokens[token])

    index = torch.tensor([[num_rows - 1, num_rows - 2], [0, -1], [num_rows - 3, num_rows - 1]])
    weights = torch.tensor([[1.0, 2.0], [3.0, 4.0], [1.0, 0.5]])
    output = torch.ops.tutel.combine(rows, index, weights)
    assert output[:, 0].tolist() == [3 + 2 * 2, 3, 1 + 1.5]
    assert output[:, -1].tolist() == [9 + 2 * 7, 15, 5 + 4.5]
    dots = torch.ops.tutel.row_dot(rows, index, torch.ones(3, width, dtype=torch.bfloat16))
    expected = [[3.0 * (width - 1) + 9, 2.0 * (width - 1) + 7], [width + 4.0, 0], [width + 4.0, 3.0 * (width - 1) + 9]]
    assert dots.tolist() == expected


@pytest.mark.slow
def test_combine_to_more_than_2_to_the_31_values():
    need_memory(5)
    width, num_tokens = 2**21, BOUNDARY // 2**21 + 2
    rows = torch.stack([torch.full((width,), value, dtype=torch.float16) for value in (1, 2)])
    index = torch.zeros(num_tokens, 1, dtype=torch.int64)
    index[-1] = 1
    output = torch.ops.tutel.combine(rows, index, None)
    assert output.numel() > BOUNDARY
    assert output[-1].eq(2).all()
    assert output[-2].eq(1).all()
    assert output[0].eq(1).all()


@pytest.mark.slow
def test_grouped_gemm():
    need_memory(5)
    outer = 2**21
    num_rows = BOUNDARY // outer + 1
    rows = torch.arange(num_rows).remainder(7).half()[:, None]
    weight = torch.ones(2, 1, outer, dtype=torch.float16)
    weight[1, 0] = 3
    offsets = torch.tensor([0, num_rows - 1, num_rows])
    output = torch.ops.tutel.grouped_gemm(rows, weight, None, offsets, False)
    assert output.numel() > BOUNDARY
    assert output[-1].eq(3 * rows[-1]).all()
    assert output[-2].eq(rows[-2]).all()


@pytest.mark.slow
def test_select_experts():
    need_memory(5)
    num_experts = 2**9
    num_tokens = BOUNDARY // num_experts + 1
    logits = torch.zeros(num_tokens, num_experts, dtype=torch.bfloat16)
    logits[-1, -1], logits[-1, 5] = 100, 90
    logits[-2, -3] = 100
    ids, weights, top_scores, score_sums = torch.ops.tutel.select_experts(logits, 2, False, False)
    assert ids[-2:].tolist() == [[num_experts - 3, 0], [num_experts - 1, 5]]
    assert weights[-2:].tolist() == [[100, 0], [100, 90]]
    assert top_scores[-3:].tolist() == [0, 100, 100]
    assert score_sums[[5, -3, -1]].tolist() == [90, 100, 100]
    assert score_sums.sum() == 290


def test_functions_accept_what_is_expanded_from_little():
    # The faces copy what is not contiguous; operators never see the expansion.
    rows = torch.ones(1, 3).expand(1000, 3)
    index, choice = torch.arange(1000)[:, None], torch.arange(1000)
    assert combine(rows, index, choice).eq(1).all()
    assert dispatch(rows, index, choice).eq(1).all()
    assert grouped_gemm(rows, torch.ones(1, 3, 2), torch.tensor([0, 1000])).eq(3).all()
    assert select_experts(rows, 2).ids.tolist() == [[0, 1]] * 1000
