"""The pure parts of the benchmarks, on results that are made up: nothing here takes a time."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2]))

from benches import aims, compare, profiling, report, sections
from benches.floors import Floors, Rates, Work
from benches.harness import Effort, Sample, Spread, alternate, pairwise_ratio, take_turns
from benches.outside import protocol
from benches.outside.run import Block
from benches.outside.tensors import load
from benches.outside.workers import Worker, WorkerError
from benches.results import Measured, Memory, PeerResult, Point, Profile, Result, Run
from benches.workload import Case, DisagreementError, Side, check_agreement, difference
from benches.workloads import skew
from benches.workloads.layer import Sizes
from benches.workloads.layer_work import forward_work, step_work, without_ties


def spread(median, width=0.0):
    return Spread(median - 2 * width, median - width, median, median + width)


def result(name, seconds, *, floor=1.0, peers=(), point=None, width=0.0):
    """A workload of so many seconds; peers are (name, ratio, width of the ratio)."""
    made = [PeerResult(peer, spread(seconds / ratio), spread(ratio, around), 9) for peer, ratio, around in peers]
    measured = Measured(name, spread(seconds, width), seconds, 9, 0.0, made, point)
    return Result(measured, floor, floor, floor, "GEMM", 1e9)


def run_of(*results, **fields):
    machine = {"date": "2026-01-01", "cpu": "a processor", "cores": "2", "tutel": "0"}
    effort = {"seconds": 1.0, "least_rounds": 3, "most_rounds": 9, "sample_seconds": 0.002}
    return Run(machine, effort, 0.0, {}, list(results), {}, **fields)


def verdict(run, aim, of):
    [found] = [each for each in aims.verdicts(run) if (each.aim, each.check.of) == (aim, of)]
    return found


# -- timing ---------------------------------------------------------------------------------------------------------


def test_sides_take_turns_in_both_orders():
    order = []

    def sampler(name):
        return lambda: order.append(name) or Sample(1.0, 1.0)

    samples = take_turns([sampler("a"), sampler("b")], Effort(0.0, least_rounds=1, most_rounds=4))
    assert len(samples[0]) == len(samples[1]) >= 1
    samples = take_turns([sampler("a"), sampler("b")], Effort(1e9, least_rounds=4, most_rounds=4))
    assert "".join(order[-8:]) == "abbaabba"
    assert [len(each) for each in samples] == [4, 4]


def test_samples_hold_whole_turns_of_the_inputs():
    calls = []
    alternate([lambda: calls.append(1)], Effort(0.0, least_rounds=1, most_rounds=1, sample_seconds=0.0), turns=4)
    # One to warm, one turn to try, and a sample of whole turns.
    assert (len(calls) - 1) % 4 == 0


def test_ratio_is_paired_by_round():
    ours = [Sample(1.0, 0), Sample(10.0, 0), Sample(2.0, 0)]
    peer = [Sample(2.0, 0), Sample(20.0, 0), Sample(4.0, 0)]
    assert pairwise_ratio(ours, peer) == Spread(0.5, 0.5, 0.5, 0.5)


def test_ratio_to_a_peer_that_was_called_once():
    assert pairwise_ratio([Sample(1.0, 0), Sample(3.0, 0)], [Sample(2.0, 0)]).median == 1.0


# -- floors ---------------------------------------------------------------------------------------------------------

RATES = Rates({torch.float32: {"a": 50.0, "b": 100.0}}, {"read": 10.0, "copy": 5.0, "first touch": 1.0})


def test_floor_is_the_larger_of_multiplying_and_moving():
    assert RATES.seconds(Work(torch.float32, flops=1000, read=10)) == 10.0
    assert RATES.bound(Work(torch.float32, flops=1000, read=10)) == "GEMM"
    assert RATES.seconds(Work(torch.float32, flops=1000, read=200)) == 20.0
    assert RATES.seconds(Work(torch.float32, moved=50)) == 10.0
    assert RATES.bound(Work(torch.float32, moved=50)) == "memory"


def test_fresh_memory_costs_its_first_touch_and_no_copy():
    assert RATES.seconds_with_fresh(Work(torch.float32, moved=50, fresh=50)) == 50.0


def test_floors_begin_empty():
    assert Floors().wall.gemm == {}


def test_work_of_a_layer():
    sizes = {"tokens": 10, "top_k": 2, "width": 4, "hidden": 8, "matrices": 3, "touched": 5}
    forward = forward_work(torch.float32, **sizes)
    assert forward.flops == 2 * 3 * 20 * 32
    assert forward.read == 3 * 32 * 4 * 5
    assert forward.moved == 2 * 10 * 4 * 4
    step = step_work(torch.float32, experts=6, **sizes)
    assert step.flops == 3 * forward.flops
    assert step.read == 2 * forward.read
    assert step.moved == 2 * forward.moved + 6 * 3 * 32 * 4


# -- agreement ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("theirs", "reason"),
    [
        (torch.tensor([1.0, 2.0]), None),
        (torch.tensor([1.0, 2.1]), "by 0.1"),
        (torch.tensor([1.0, float("nan")]), "by nan"),
        (torch.tensor([1.0, 2.0, 3.0]), "shapes [2] and [3]"),
    ],
)
def test_difference(theirs, reason):
    found = difference(torch.tensor([1.0, 2.0]), theirs)
    assert found is None if reason is None else found.startswith(reason)


def test_sides_that_disagree_are_refused():
    case = Case(
        Side("tutel", lambda: [torch.ones(3)]), [Side("peer", lambda: [torch.zeros(3)])], Work(torch.float32, flops=1)
    )
    with pytest.raises(DisagreementError, match="result 0 differs from that of peer"):
        check_agreement(case)


def test_tokens_without_ties():
    tokens = torch.arange(4.0)[:, None]
    logits = torch.tensor([[3.0, 1.0, 0.0], [1.0, 1.0, 0.0], [2.0, 1.0, 1.0], [0.0, 5.0, 5.0]])
    assert without_ties(tokens, logits, 1, 2).flatten().tolist() == [0.0, 2.0]
    with pytest.raises(ValueError, match="only 2 tokens choose without doubt, 3 are needed"):
        without_ties(tokens, logits, 1, 3)


def test_every_expert_chosen_leaves_no_doubt():
    assert len(without_ties(torch.zeros(3, 1), torch.zeros(3, 2), 2, 3)) == 3


@pytest.mark.parametrize(("chances", "low", "high"), [(skew.one_hot, 0.87, 0.93), (skew.uniform, 0.0, 0.05)])
def test_skew_is_as_it_says(chances, low, high):
    sizes = Sizes(torch.bfloat16, 1, 4096, 64, 64, 8, 1)
    first = skew.tokens_with(chances, sizes)[0, :, :64].argmax(dim=1)
    assert low < float((first == 0).float().mean()) < high


def test_half_of_the_experts_stay_empty():
    sizes = Sizes(torch.float32, 1, 1000, 64, 64, 8, 2)
    chosen = skew.tokens_with(skew.half_empty, sizes)[0, :, :64].topk(2, dim=1).indices
    assert chosen.shape == (1000, 2)
    assert not (chosen % 2).any()


# -- aims -----------------------------------------------------------------------------------------------------------


def test_aim_is_judged_by_its_worst_workload():
    run = run_of(
        result("layer.train.fp32.E2_k2", 1.1),
        result("layer.train.bf16.E2_k2", 1.38),
        result("layer.train.fp32.E64_k2", 1.5),
    )
    missed = verdict(run, 1, "E2 H2048")
    assert (missed.worst, missed.where, missed.met) == (1.38, "layer.train.bf16.E2_k2", False)
    assert missed.outcome() == "missed by 20%"
    assert verdict(run, 1, "E64 H512").outcome() == "met"
    assert verdict(run, 3, "both").outcome() == "not measured"


def test_best_peer_is_the_one_that_we_compare_worst_with():
    run = run_of(result("hf.forward.fp32.mixtral_T1", 1.0, peers=[("slow", 0.5, 0), ("fast", 1.25, 0)]))
    never_slower = verdict(run, 2, "never slower")
    assert (never_slower.worst, never_slower.where) == (1.25, "hf.forward.fp32.mixtral_T1, fast")
    assert verdict(run, 2, "decode T = 1").outcome() == "met"
    assert verdict(run, 2, "decode T = 8").worst is None


def test_routing_is_judged_in_milliseconds():
    assert verdict(run_of(result("route.forward.E256_k8_T8192.threads1", 3e-3)), 4, "time").outcome() == "missed by 50%"


def test_memory_is_judged_for_our_side():
    memory = [Memory("hf.train.x", "tutel", 100, 101, 150, 9), Memory("hf.train.x", "peer", 100, 900, 900, 9)]
    run = run_of(memory=memory)
    assert verdict(run, 5, "tensors").met
    assert verdict(run, 5, "the process").worst == 1.5


def test_growth_along_curves():
    points = [(512, 1.0), (4096, 8.0), (32768, 80.0)]
    run = run_of(*(result(f"t{x}", seconds, point=Point("tokens", x, "forward fp32")) for x, seconds in points))
    linear = verdict(run, 7, "along tokens")
    assert (linear.worst, linear.where) == (pytest.approx(1.25), "forward fp32")
    assert linear.met
    run = run_of(*(result(f"e{x}", x * 1.0, point=Point("experts", x, "forward fp32")) for x in (1, 2)))
    assert not verdict(run, 7, "along experts").met


def test_every_aim_has_a_number_and_a_text():
    assert len(aims.AIMS) == 7
    assert all(aim.checks and aim.text for aim in aims.AIMS)


# -- reports --------------------------------------------------------------------------------------------------------

FULL = run_of(
    result("layer.train.fp32.E2_k2", 0.5, floor=0.25, peers=[("loop", 0.8, 0.01), ("grouped", 0.9, 0.01)]),
    result("alone", 0.002, floor=0.004),
    memory=[Memory("layer.train.x", "tutel", 2**20, 2**21, 3 * 2**20, 2**19)],
    profiles=[Profile("alone", [(0.75, "_core.so", "kernel"), (0.25, "libc.so", "memmove")])],
    missing={"deepspeed": "not installed"},
)


def test_record_begins_with_the_aims():
    text = report.markdown(FULL, "name", [Path("somewhere/name/tokens.png")])
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    assert headings[0] == "## Aims"
    assert headings[-1] == "## Again"
    for part in ("Peak memory of a training step", "Where processor time goes", "Curves", "Results"):
        assert f"## {part}" in headings
    assert "![tokens](name/tokens.png)" in text
    assert "Missing: deepspeed: not installed" in text
    assert "| 1 | E2 H2048 | 1.15 x floor | 2.00 x floor | missed by 74% |" in text


def test_record_without_parts_has_no_empty_sections():
    text = report.markdown(run_of(result("alone", 1.0)), "name")
    assert "## Aims" not in text
    assert "## Peak memory" not in text
    assert "## Curves" not in text


def test_each_peer_has_a_row_and_a_lone_workload_one():
    lines = report.text(FULL).splitlines()
    assert sum("loop" in line or "grouped" in line for line in lines) == 2
    # More than the floor allows is marked.
    assert "200%! G" in next(line for line in lines if line.startswith("alone "))


def test_memory_table():
    assert sections.memory(FULL).rows == [["layer.train.x", "tutel", "1", "2", "3", "0", "2.00", "3.00"]]


def test_profile_table_names_the_workload_once():
    assert [row[0] for row in sections.profiles(FULL).rows] == ["alone", ""]


def test_run_survives_json(tmp_path):
    run = replace(FULL, results=[*FULL.results, result("curve", 1.0, point=Point("tokens", 8, "forward fp32"))])
    path = tmp_path / "run.json"
    path.write_text(run.to_json())
    assert Run.read(path) == run
    path.write_text(run.to_json().replace('"version": 2', '"version": 1'))
    with pytest.raises(ValueError, match="of version 1, this program reads version 2"):
        Run.read(path)


# -- comparing two runs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (spread(1.0, 0.01), spread(0.8, 0.01), "faster"),
        (spread(1.0, 0.01), spread(1.2, 0.01), "slower"),
        (spread(1.0, 0.15), spread(1.2, 0.15), ""),
        (spread(1.0, 0.001), spread(1.01, 0.001), ""),
    ],
)
def test_verdict_of_two_measurements(before, after, expected):
    assert compare.verdict(before, after) == expected


def test_comparison_tells_what_changed():
    before = run_of(
        result("steady", 1.0, peers=[("loop", 0.8, 0.01)]),
        result("better", 1.0, peers=[("loop", 0.8, 0.01)]),
        result("alone", 1.0, width=0.01),
        result("gone", 1.0),
    )
    after = run_of(
        # Slower by the clock, but so was its peer.
        result("steady", 2.0, peers=[("loop", 0.8, 0.01)]),
        result("better", 1.0, peers=[("loop", 0.5, 0.01), ("new", 0.5, 0.01)]),
        result("alone", 1.5, width=0.01),
        result("added", 1.0),
    )
    lines = compare.compare(before, after, "a.json", "b.json").splitlines()
    changed = lines[lines.index("changed by more than the noise, from A to B:") + 1 :]
    assert changed == ["faster: better: 0.80 to 0.50 times loop", "slower: alone: 1000 to 1500 ms"]
    assert "only in A: gone" in lines
    assert "only in B: added" in lines


def test_comparison_of_a_run_with_itself():
    assert compare.compare(FULL, FULL, "a", "a").splitlines()[-1] == "nothing"


# -- peers outside ----------------------------------------------------------------------------------------------------


def test_block_as_files(tmp_path):
    block = Block("small", experts=4, hidden=8, top_k=2, tokens=3, dtype="bf16")
    job, work = block.write(tmp_path, threads=1)
    assert str(block) == "outside.forward.bf16.small_T3"
    assert load(job, "router", 4, job.width).dtype == torch.bfloat16
    inputs = torch.frombuffer(bytearray(job.path("inputs").read_bytes()), dtype=torch.float32)
    assert inputs.numel() == job.inputs * job.tokens * job.width
    # Exact in the dtype, so that all sides read the same numbers.
    assert torch.equal(inputs, inputs.bfloat16().float())
    assert work.flops == 2 * 3 * 3 * 2 * 8 * job.width
    assert load(job, "down", 4, job.width, 8).shape == (4, job.width, 8)


def test_worker_that_is_not_there(tmp_path):
    worker = Worker("absent", tmp_path / "python", "benches.outside.ours_worker")
    with pytest.raises(WorkerError, match=r"absent: .*No such file"):
        worker.start()


def test_worker_that_dies():
    worker = Worker("dead", Path(sys.executable), "benches.outside.no_such_worker")
    worker.start()
    with pytest.raises(WorkerError, match=r"dead: ended with status 1: .*No module named"):
        worker.sample(1, 1)
    worker.stop()


def test_worker_answers(tmp_path):
    outputs = []
    block = (outputs.append, lambda: b"last")
    answer = protocol._answer(block, {"calls": 5, "inputs": 2})
    assert outputs == [0, 1, 0, 1, 0]
    assert set(answer) == {"wall", "cpu"}
    protocol._answer(block, {"output": str(tmp_path / "out")})
    assert (tmp_path / "out").read_bytes() == b"last"


# -- profiles -------------------------------------------------------------------------------------------------------


def test_functions_from_a_report_of_perf():
    text = """# Overhead|Shared Object|Symbol|IPC
 40.00% |_core.abi3.so |[.] tutel_cpu::gemm::tile::h0123456789abcdef |- -
 20.00% |_core.abi3.so |[.] 0x000000000000abcd |- -
 15.00% |_core.abi3.so |[.] 0x00000000000012ef |- -
 5.00%  |[kernel.kallsyms] |[k] clear_page_erms |- -
"""
    assert profiling.parse(text) == [
        (pytest.approx(0.40), "_core.abi3.so", "tutel_cpu::gemm::tile"),
        (pytest.approx(0.35), "_core.abi3.so", "(no symbols)"),
        (pytest.approx(0.05), "[kernel.kallsyms]", "clear_page_erms"),
    ]
