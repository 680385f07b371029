"""The programs that measure several ranks: what they count, what they report, and that the soak can fail."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import distributed
from tutel.distributed.cost import Links

# They are programs of the repository, not part of the package.
sys.path.append(str(Path(__file__).parents[2]))

from benches.distributed import cli, raw, soak
from benches.distributed.layers import Compared, Mode, Modes, Sent, Shape
from benches.distributed.ranks import RanksError, run_ranks
from benches.distributed.report import markdown
from benches.distributed.run import Found
from benches.distributed.sampling import Effort, alternate, ratio
from benches.distributed.traffic import watch
from benches.harness import Spread
from tutel import net

LINKS = Links(1e9, 1e9, 1e-4, 1e-4, 2, 1e11)

# -- ranks ----------------------------------------------------------------------------------------------------------


def fail_on_one(how):
    if distributed.get_rank() == 1:
        if how == "raise":
            raise ValueError("this is what went wrong")
        if how == "die":
            os._exit(3)
        time.sleep(60)
    return distributed.get_rank()


@pytest.mark.parametrize(
    ("how", "text", "timeout"),
    [("raise", "this is what went wrong", 60), ("die", "rank 1 died", 60), ("hang", "1 of 2 ranks did not end", 6)],
)
def test_ranks_that_fail(how, text, timeout):
    with pytest.raises(RanksError, match=text):
        run_ranks(fail_on_one, 2, how, timeout=timeout)


def say_where(path):
    Path(f"{path}.{distributed.get_rank()}").write_text(str(os.getpid()))
    time.sleep(60)


def test_ranks_end_with_the_program_that_started_them(tmp_path):
    program = (
        "from benches.distributed.ranks import run_ranks; from test_benches_distributed import say_where; "
        f"run_ranks(say_where, 2, {str(tmp_path / 'pid')!r}, timeout=60)"
    )
    folders = [str(Path(__file__).parents[2]), str(Path(__file__).parent), *filter(None, sys.path)]
    started = subprocess.Popen(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
    )
    pids = [tmp_path / f"pid.{rank}" for rank in range(2)]
    wait_until(lambda: all(path.exists() and path.read_text() for path in pids), 50)
    started.kill()
    started.wait()
    wait_until(lambda: not any(Path(f"/proc/{path.read_text()}").exists() for path in pids), 10)


def wait_until(happened, seconds):
    until = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < until
        time.sleep(0.1)


def count_and_time():
    rank = distributed.get_rank()
    rows = torch.ones(5, 3)
    with watch() as traffic:
        # Rank 0 keeps 4 of its 5 rows, rank 1 keeps 2.
        sends = [[4, 1], [3, 2]][rank]
        received = torch.empty([[4, 3], [1, 2]][rank][0] + [[4, 3], [1, 2]][rank][1], 3)
        distributed.all_to_all_single(received, rows, [[4, 3], [1, 2]][rank], sends)
        counts = torch.zeros(4, dtype=torch.int64)
        distributed.all_to_all_single(torch.empty_like(counts), counts)
        distributed.all_gather_into_tensor(torch.empty(4, 3), torch.ones(2, 3))
    order = []
    sides = {"quick": lambda: order.append("q"), "slow": lambda: time.sleep(0.02 * (1 + rank))}
    seconds = alternate(sides, Effort(rounds=3, sample_seconds=0.0))
    return vars(traffic), seconds


def test_bytes_are_counted_and_the_slowest_rank_is_timed():
    (first, seconds), (second, other_seconds) = run_ranks(count_and_time, 2, timeout=60)
    assert first == {"rows": 1 * 3 * 4, "numbers": 2 * 8, "weights": 2 * 3 * 4, "calls": 3}
    assert second == {"rows": 3 * 3 * 4, "numbers": 2 * 8, "weights": 2 * 3 * 4, "calls": 3}
    assert seconds == other_seconds
    assert {name: len(taken) for name, taken in seconds.items()} == {"quick": 3, "slow": 3}
    assert min(seconds["slow"]) >= 0.04


# -- the model beside bare collectives ------------------------------------------------------------------------------


def test_bare_collectives_as_the_model_has_them():
    links = Links(1e9, 1e9, 1e-3, 1e-3, 4, 1e11)
    assert raw._exchange_seconds(4096, 4, links) == pytest.approx(3 * 1e-3 + 3072 / 1e9)
    assert raw._gather_seconds(1024, 4, links) == pytest.approx(3 * (1e-3 + 1024 / 1e9))


def test_sizes_of_a_layer():
    sizes = Shape(16, 8, 32, -2, 1).sizes(4)
    assert (sizes.num_experts, sizes.shards, sizes.rows) == (2, 2, 16)
    assert Shape(16, 8, 32, 3, 2).sizes(4).local_experts == 3


# -- the record -----------------------------------------------------------------------------------------------------


def spread(value):
    return Spread(value, value, value, value)


def test_record():
    sides = {"a": spread(0.1), "our exchange": spread(0.125), "with counts": spread(0.2)}
    ratios = {"a": spread(1.0), "our exchange": spread(1.25), "with counts": spread(2.0)}
    switches = {"one after the other": spread(0.1), "by turns": spread(0.101)}
    modes = [Mode(1, spread(0.03), 0.01, 0.02, 0.005), Mode(2, spread(0.02), 0.002, 0.01, 0.001)]
    found = Found(
        ranks=2,
        threads=1,
        links=LINKS,
        bare=[raw.Bare("all_to_all 4 KiB", 2048, spread(2e-3), 1e-3)],
        sent=[Sent("ragged", 100, 100, 16), Sent("fixed", 150, 100, 0)],
        exchange=[Compared("64 rows", sides, ratios, 10**6)],
        overlap=Compared("a layer", sides, ratios),
        switching=[Compared("a layer", switches, {"by turns": spread(1.01)})],
        modes=[Modes("a layer", modes, spread(0.018), chosen=1)],
    )
    text = markdown([found], {"cpu": "a processor", "cores": "2", "date": "2026-01-01"}, 0.3, "A note.", "a command")
    assert text.startswith("# Several ranks over Gloo: a processor, 2 cores, 2026-01-01\n")
    assert "kept 0.3 of 2 cores busy during the run. A note." in text
    for row in [
        "| ragged | 100 | 100 | 1.000 | 16 |",
        "| fixed | 150 | 100 | 1.500 | 0 |",
        "| all_to_all 4 KiB | 2048 | 2.00 | 2.00 | 1.00 | 0.50 |",
        "| 64 rows | 1.00 | 100 | 125 | 80% | 200 | 50% |",
        "| a layer | 100 | 101 | 1.010 | 1.01-1.01 |",
        "| a layer | 18.0 | 1 | 30.0 | 30.0-30.0 | 10.0 | 20.0 | 5.00 | x | 1.50 |",
        "|  |  | 2 | 20.0 | 20.0-20.0 | 2.00 | 10.0 | 1.00 |  |  |",
    ]:
        assert row in text, row


def test_ratio_is_taken_round_by_round():
    assert ratio([1.0, 10.0], [2.0, 20.0]) == spread(0.5)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [(["--ranks=1"], "--ranks must be numbers from 2 on"), (["--record=a/b"], "--record must be a plain file name")],
)
def test_wrong_calls(capsys, arguments, text):
    with pytest.raises(SystemExit) as raised:
        cli.main(arguments)
    assert raised.value.code == 2
    assert text in capsys.readouterr().err


# -- the soak -------------------------------------------------------------------------------------------------------


def test_soak(capsys):
    assert soak.main(["--steps=12"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("rank ") == 4
    assert "OK: 12 steps, " in printed


def soak_without_reducing():
    """Train gates by each rank's own gradient, as if the all-reduce were forgotten."""
    net.simple_all_reduce = lambda tensor, **options: tensor
    return soak.soak(8, 0)


def test_soak_notices_a_difference():
    verdicts = run_ranks(soak_without_reducing, soak.RANKS, timeout=60)
    assert all(any(text.startswith("parameters differ by") for text in verdict.failures) for verdict in verdicts)


def test_verdict():
    fine = {"output": 1e-15, "l_aux": 0.0, "parameters": 1e-14, "resident": (100 << 20, 101 << 20)}
    rest = {"switches": 1, "tokens": 1, "seconds": 1.0}
    assert soak.Verdict(**fine, **rest).failures == []
    assert soak.Verdict(**{**fine, "output": float("nan")}, **rest).failures == [
        "outputs differ by nan, allowed is 1e-10"
    ]
    assert soak.Verdict(**{**fine, "resident": (100 << 20, 200 << 20)}, **rest).failures == [
        "resident memory grew by 100 MiB, allowed is 16 MiB"
    ]
