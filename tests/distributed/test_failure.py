"""A rank that fails, in every way: the others end in time, and say which rank failed and in which stage."""

import os
import pickle
import signal
import subprocess
import sys
import threading
import time

import torch
from pytest import fixture, mark, raises
from ranks import Ended, end_ranks, free_port, printed
from torch import distributed
from tutel.distributed import RankError, failure
from tutel.distributed.failure import stage

from tutel import net, system

#: How long ranks wait for each other here, in seconds.
SHORT = {"TUTEL_GLOBAL_TIMEOUT_SEC": "5"}


def exchange(work=distributed.all_to_all_single):
    rows = torch.ones(8 * distributed.get_world_size(), 4)
    with stage("exchange of rows", None, rows):
        work(rows) if work is distributed.all_reduce else work(torch.empty_like(rows), rows)


def last_line(end: Ended) -> str:
    """Give the message of the error that ended a rank."""
    errors = [line for line in end.output.splitlines() if "tutel.distributed.failure.RankError: " in line]
    assert errors, end.output
    return errors[-1].split("RankError: ", 1)[1]


def check_others(ended, victims, within, *parts):
    """Every rank but some ends with a RankError that has certain parts, with an exit code, in time."""
    for rank, end in enumerate(ended):
        if rank not in victims:
            assert end.code == 1, end.output
            assert end.seconds < within
            message = last_line(end)
            assert message.startswith(f"rank {rank} of {len(ended)}: ")
            for part in parts:
                assert part in message


def is_killed(victim, work):
    exchange(work)
    if distributed.get_rank() == victim:
        # In the middle of an exchange: the others have sent their rows, and wait for this rank's.
        threading.Timer(0.3, os.kill, [os.getpid(), signal.SIGKILL]).start()
        time.sleep(30)
    exchange(work)


@mark.parametrize(
    ("victim", "work"),
    [(0, distributed.all_to_all_single), (2, distributed.all_to_all_single), (2, distributed.all_reduce)],
)
def test_a_killed_rank_is_named(victim, work):
    ended = end_ranks(is_killed, 4, victim, work, env={"TUTEL_GLOBAL_TIMEOUT_SEC": "20"})
    assert ended[victim].code == -signal.SIGKILL
    check_others(ended, [victim], 30, f"exchange of rows failed: rank {victim} did not answer")


def raises_an_error(victim, *, in_the_background=False):
    exchange()
    if distributed.get_rank() == victim:
        if in_the_background:
            # Its end must not wait for an exchange that nobody else joins.
            rows = torch.ones(4 * distributed.get_world_size())
            distributed.all_to_all_single(torch.empty_like(rows), rows, async_op=True)
        raise KeyError("the data set is damaged")
    time.sleep(0.2)
    exchange()


@mark.parametrize("victim", [0, 1])
def test_the_error_of_another_rank_is_quoted(victim):
    ended = end_ranks(raises_an_error, 3, victim, env={"TUTEL_GLOBAL_TIMEOUT_SEC": "20"})
    assert ended[victim].code == 1
    assert "KeyError: 'the data set is damaged'" in ended[victim].output
    assert max(end.seconds for end in ended) < 15
    quoted = f"exchange of rows failed: rank {victim} raised KeyError: 'the data set is damaged'"
    check_others(ended, [victim], 30, quoted)


def is_left_alone(victim):
    if distributed.get_rank() == victim:
        raise KeyError("the data set is damaged")
    distributed.barrier()  # as others call it, outside of any stage


def test_collectives_of_others_are_explained_too():
    ended = end_ranks(is_left_alone, 3, 1, env=SHORT)
    assert [end.code for end in ended] == [1, 1, 1]
    for rank in (0, 2):
        message = ended[rank].output.strip().splitlines()[-1]
        assert f"RankError: rank {rank} of 3: a collective failed: " in message
        assert "rank 1 raised KeyError: 'the data set is damaged'" in message


def raises_in_flight(victim):
    raises_an_error(victim, in_the_background=True)


def test_a_rank_that_raises_does_not_wait_for_its_exchange():
    ended = end_ranks(raises_in_flight, 2, 1, env={"TUTEL_GLOBAL_TIMEOUT_SEC": "40"}, timeout=60)
    assert [end.code for end in ended] == [1, 1]
    assert max(end.seconds for end in ended) < 20


def never_comes(victim, timeout):
    if distributed.get_rank() == victim:
        until = time.monotonic() + timeout + 12
        while not failure._watch.heard and time.monotonic() < until:
            time.sleep(0.1)
        time.sleep(1)
        os._exit(0)
    net.barrier()


@mark.parametrize(("victim", "timeout"), [(1, 5), (2, 20)])
def test_a_rank_that_does_not_come_to_a_collective_is_named(victim, timeout):
    ended = end_ranks(never_comes, 3, victim, timeout, env={"TUTEL_GLOBAL_TIMEOUT_SEC": str(timeout)})
    check_others(ended, [victim], timeout + 10, "barrier failed: ", f"rank {victim} is not in a collective")


def starts_late(victim):
    if int(os.environ["RANK"]) != victim:
        system.init_data_model_parallel(backend="gloo")


@mark.parametrize("victim", [0, 2])
def test_a_rank_that_does_not_start_is_named(victim):
    ended = end_ranks(starts_late, 3, victim, env=SHORT, start=False)
    assert ended[victim].code == 0
    check_others(ended, [victim], 15, f"start failed: rank {victim} did not come to 127.0.0.1:", " within 5 s")


def leaves_early(victim):
    exchange()
    if distributed.get_rank() != victim:
        time.sleep(0.3)
        exchange()


@mark.parametrize("victim", [0, 1])
def test_a_rank_that_ends_before_the_others_is_named(victim):
    ended = end_ranks(leaves_early, 3, victim, env=SHORT)
    assert ended[victim].code == 0
    what = "rank 1 ended the program before" if victim else "rank 0 did not answer"
    check_others(ended, [victim], 15, "exchange of rows failed: ", what)


def catches():
    """Errors that are no failure of a collective pass; and a RankError can be caught, read and sent."""
    with raises(ValueError, match="a bug"), stage("exchange of rows"):
        raise ValueError("a bug")
    with raises(torch.OutOfMemoryError), stage("exchange of rows"):
        raise torch.OutOfMemoryError("no memory")
    rank = net.get_world_rank()
    if rank == 1:
        os._exit(7)
    with raises(RankError) as caught:
        exchange()
    error = pickle.loads(pickle.dumps(caught.value))
    assert (error.rank, error.stage, error.silent) == (rank, "exchange of rows", (1,))
    assert set(error.reports) <= {0, 2} - {rank}
    assert "Connection" in str(error)
    return True


def test_the_error_can_be_caught():
    ended = end_ranks(catches, 3)
    assert [end.code for end in ended] == [0, 7, 0]
    assert ended[0].result


def test_a_stage_alone():
    with raises(RankError, match="rank 0: exchange of rows failed: no connection"), stage("exchange of rows"):
        raise RuntimeError("no connection")


PROGRAM = """
import sys, torch
from tutel import net, system
session = system.init_data_model_parallel(backend="gloo")
net.simple_all_reduce(torch.ones(3), inplace=True)
net.create_groups_from_world(2)
if session.global_rank == 1:
    {victim}
net.barrier()
"""


@fixture
def start_program(monkeypatch):
    """Starts a program of W ranks as a launcher does, each a fresh interpreter."""
    processes = []

    def start(source, world_size):
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world_size)}
        place["TUTEL_GLOBAL_TIMEOUT_SEC"] = "30"
        for rank in range(world_size):
            env = os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            command = [sys.executable, "-W", "error", "-c", source]
            pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
            processes.append(subprocess.Popen(command, env=env, text=True, **pipe))
        return [(printed(process.communicate(timeout=90)[0]), process.returncode) for process in processes]

    yield start
    for process in processes:
        process.kill()
        process.wait()


def test_programs_end_without_a_word(start_program):
    assert start_program(PROGRAM.format(victim="pass"), 2) == [("", 0), ("", 0)]


def test_failing_programs_have_exit_codes(start_program):
    (first, code), (second, other_code) = start_program(PROGRAM.format(victim="raise ValueError('broken')"), 2)
    assert (code, other_code) == (1, 1)
    assert second.rstrip().endswith("ValueError: broken")
    assert "RankError: rank 0 of 2: barrier failed: rank 1 raised ValueError: broken" in first, first


def is_stopped(victim):
    """The host of the store stands still, and answers nobody."""
    pids = net.simple_all_gather(torch.tensor([os.getpid()]))
    if distributed.get_rank() == victim:
        os.kill(os.getpid(), signal.SIGSTOP)
    try:
        exchange()
    finally:
        os.kill(int(pids[victim]), signal.SIGKILL)


def test_a_host_of_the_store_that_stands_still_stops_nobody():
    ended = end_ranks(is_stopped, 2, 0, env={"TUTEL_GLOBAL_TIMEOUT_SEC": "3"})
    check_others(ended, [0], 3 + 10 + 4, "exchange of rows failed: rank 0 did not answer")
