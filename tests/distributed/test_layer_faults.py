"""A rank fails while a layer trains: the others end in time, and say which rank and in which stage."""

import os
import signal
import time
from typing import Any

import pytest
import torch
from layer_twin import MODEL_DIM, Case, make_pair
from ranks import end_ranks
from torch import Tensor

from tutel import net

TIMEOUT = 5.0
#: Beyond the timeout: for hearing of the failure, and for the end of the process.
GRACE = 10.0


def is_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def raises() -> None:
    raise ArithmeticError("no sum is this large")


def sleeps() -> None:
    time.sleep(TIMEOUT + GRACE + 5)


class FailsInBackward(torch.autograd.Function):
    """The identity, whose gradient fails."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise ArithmeticError("no sum is this large")


def train(victim: int, fail: Any, exchange: dict[str, Any], degree: int) -> None:
    """Train; at the third step the victim fails while it computes its experts."""
    step = 0

    def activation(hidden: Tensor) -> Tensor:
        if step == 2 and net.get_world_rank() == victim:
            if fail is FailsInBackward:
                hidden = FailsInBackward.apply(hidden)
            else:
                fail()
        return hidden.tanh()

    layer, _ = make_pair(
        Case(-3 if degree != 1 else 2, layer=exchange, gate={"k": 1}, experts={"activation_fn": activation})
    )
    tokens = torch.randn(8, MODEL_DIM, dtype=torch.float64)
    for step in range(4):  # noqa: B007  (activation reads it)
        layer(tokens, adaptive_r=degree).sum().backward()


@pytest.mark.parametrize(
    ("fail", "exchange", "degree", "stage"),
    [
        (is_killed, {}, 1, "rows from the experts"),
        (is_killed, {"a2a_ffn_overlap_degree": 2}, 1, "the experts failed"),
        (raises, {"exchange": "fixed"}, 1, "rows from the experts"),
        (raises, {"exchange": "gather"}, 1, "reduce_scatter"),
        (raises, {}, 0, "gradient of all_gather"),
        (sleeps, {}, 1, "rows from the experts"),
        (FailsInBackward, {}, 3, "gradient of all_gather"),
    ],
)
def test_the_others_end_and_name_the_rank(fail: Any, exchange: dict[str, Any], degree: int, stage: str) -> None:
    victim = 1
    ended = end_ranks(
        train, 3, victim, fail, exchange, degree, env={"TUTEL_GLOBAL_TIMEOUT_SEC": str(TIMEOUT)}, timeout=60
    )
    for rank, end in enumerate(ended):
        assert end.code not in (0, None), (rank, end)
        if rank == victim:
            continue
        assert end.seconds < TIMEOUT + GRACE + 10  # which start-up takes on a busy machine
        last = [line for line in end.output.splitlines() if "RankError" in line][-1]
        assert f"rank {rank} of 3" in last
        assert f"rank {victim}" in last, end.output
        assert stage in last, last
        if fail is raises:
            assert "no sum is this large" in last
