"""A rank that fails, in every way: the others end in time, and say which rank and in which stage."""

import os
import signal
import threading
import time

import torch
from pytest import mark
from ranks import end_ranks
from torch import distributed
from tutel.distributed.failure import stage


def exchange(work=distributed.all_to_all_single):
    rows = torch.ones(8 * distributed.get_world_size(), 4)
    with stage("exchange of rows", None, rows):
        if work is distributed.all_reduce:
            work(rows)
        else:
            work(torch.empty_like(rows), rows)


def is_killed(victim, work):
    exchange(work)
    if distributed.get_rank() == victim:
        # In the middle of an exchange: the others have sent their rows, and wait for this rank's.
        threading.Timer(0.3, os.kill, [os.getpid(), signal.SIGKILL]).start()
        time.sleep(30)
    exchange(work)


@mark.parametrize("work", [distributed.all_to_all_single, distributed.all_reduce])
@mark.parametrize("victim", [0, 2])
def test_a_killed_rank_is_named(victim, work):
    ended = end_ranks(is_killed, 4, victim, work, env={"TUTEL_GLOBAL_TIMEOUT_SEC": "20"})
    assert ended[victim].code == -signal.SIGKILL
    for rank, end in enumerate(ended):
        if rank != victim:
            assert end.code == 1
            assert end.seconds < 30
            last = end.output.strip().splitlines()[-1]
            assert f"RankError: rank {rank} of 4: exchange of rows failed" in last
            assert f"failed: rank {victim} did not answer" in last
