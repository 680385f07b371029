"""The examples on several ranks: each rank calls ``main`` in a process of its own.

All ranks train on the same tokens, so what is summed over W ranks is W times what one rank has.
"""

import contextlib
import importlib
import io
import re

import torch
from pytest import approx, fixture, mark
from ranks import run_ranks

from tutel import net
from tutel.examples import _shared

TINY = ["--batch_size=2", "--num_tokens=12", "--model_dim=8", "--hidden_size=12", "--device=cpu", "--dtype=float64"]
ONCE = "--num_steps=1"
UNTRAINED = "without a learning rate"
EXACT = {"rel": 1e-12}

#: What two ranks run, one after the other.
PROGRAMS = {
    "helloworld": ["helloworld"],
    UNTRAINED: ["helloworld", ONCE],
    "not reduced": ["helloworld", ONCE, "--allreduce_degree=0"],
    "summed": ["helloworld", ONCE],
    "averaged": ["helloworld_ddp", ONCE],
    "ddp": ["helloworld_ddp"],
    "ddp_tutel": ["helloworld_ddp_tutel"],
    "one model": ["helloworld_data_model"],
    "two models": ["helloworld_data_model", ONCE, "--group_count=2"],
    "megatron": ["helloworld_megatron"],
    "one expert": ["helloworld", "--num_local_experts=-2", "--hidden_size=48"],
    "sharded, data": ["helloworld_custom_expert_sharded", "--parallel_type=data"],
    "sharded, model": ["helloworld_custom_expert_sharded", "--parallel_type=model"],
    "sharded, gathered": ["helloworld_custom_expert_sharded", "--parallel_type=adaptive:0"],
    "switching": ["helloworld_switch", "--num_steps=7", "--num_local_experts=-2", "--capacity_factor=0"],
    "not switching": ["helloworld", "--num_steps=7", "--num_local_experts=-2", "--capacity_factor=0"],
    "by hand": ["helloworld_from_scratch", "--l_aux_wt=0.5", "--capacity_factor=0.5"],
    "mixed precision": ["helloworld_amp", "--dtype=float32"],
    "by layer": ["helloworld_custom_gate_expert", "--l_aux_wt=0.5", "--capacity_factor=0.5"],
}
GATE = "_moe_layer.gates.0.wg.weight"


def run_all(folder, programs):
    """Run programs on this rank; give what the first rank printed of losses, and this rank's weights after training."""
    results, rate = {}, _shared.LEARNING_RATE
    for what, (name, *arguments) in programs.items():
        _shared.LEARNING_RATE = 0.0 if what == UNTRAINED else rate
        weights = f"{folder}/{{rank}} {what}.pt"
        printed = run_one(name, *TINY, "--num_steps=3", f"--checkpoint_path={weights}", *arguments)
        losses = [float(loss) for loss in re.findall(r"DONE, loss = (\S+),", printed)]
        results[what] = losses, torch.load(weights.format(rank=net.get_world_rank()))
    return results


def run_one(name, *arguments):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        importlib.import_module(f"tutel.examples.{name}").main(arguments)
    return printed.getvalue()


@fixture(scope="module")
def both(tmp_path_factory):
    return run_ranks(run_all, 2, str(tmp_path_factory.mktemp("two")), PROGRAMS)


def losses(both, what):
    return both[0][what][0]


@mark.parametrize(("left", "right"), [
    ("helloworld", "one model"),
    ("ddp", "ddp_tutel"),
    ("megatron", "one expert"),
    ("sharded, data", "sharded, model"),
    ("sharded, data", "sharded, gathered"),
    ("switching", "not switching"),
    ("by hand", "by layer"),
])  # fmt: skip
def test_two_programs_that_compute_the_same(left, right, both):
    found = losses(both, left)
    assert found == approx(losses(both, right), **EXACT)
    assert len(found) == (7 if "switching" in left else 3)
    assert found == sorted(found, reverse=True)
    assert found[0] > found[-1]


def test_ranks_keep_the_same_gate(both):
    compared = [what for what, (_, weights) in both[0].items() if GATE in weights]
    assert len(compared) > len(PROGRAMS) / 2
    assert [what for what in compared if not torch.equal(both[0][what][1][GATE], both[1][what][1][GATE])] == []


def test_gradients_of_the_gate_are_reduced(both):
    before = both[0][UNTRAINED][1][GATE]
    alone, summed, averaged = (both[0][what][1][GATE] - before for what in ("not reduced", "summed", "averaged"))
    assert alone.abs().max() > 0
    torch.testing.assert_close(summed, 2 * alone, rtol=1e-8, atol=1e-16)
    torch.testing.assert_close(averaged, alone, rtol=1e-8, atol=1e-16)


def test_replicas_of_an_expert_sum_their_gradients(both, tmp_path):
    torch.set_default_dtype(torch.float64)
    alone = run_all(tmp_path, {what: PROGRAMS[what] for what in (UNTRAINED, "summed")})
    before, after = alone[UNTRAINED][1], alone["summed"][1]
    for rank in both:
        found_losses, found = rank["two models"]
        assert found_losses == ([] if rank is both[1] else approx(alone["summed"][0], **EXACT))
        for name, weight in found.items():
            torch.testing.assert_close(weight - before[name], 2 * (after[name] - before[name]), rtol=1e-8, atol=1e-16)


def test_collectives_between_three_ranks():
    printed = run_ranks(run_collectives, 3)[0].splitlines()
    assert [line for line in printed if "right" in line] == [line for line in printed if line.startswith("[Summary]")]
    assert "rank 2 received [333, 0, 333] elements from ranks 0 to 2" in printed
    assert "each rank received [500, 0, 250] elements from ranks 0 to 2" in printed
    rows = [re.split(r"  +", line) for line in printed if line.endswith("GB/s") and line[0] != "["]
    # 1000 elements are rounded up to what three ranks can divide.
    assert [row[1] for row in rows] == ["3.914 KiB", "7.816 KiB", "15.63 KiB"] * 5 + ["3.906 KiB"]
    for name, _, _, rate, bus in rows[:-1]:
        share = {"all_reduce": 4 / 3, "broadcast": 1}.get(name, 2 / 3)
        assert float(bus.split()[0]) == approx(share * float(rate.split()[0]), rel=0.01, abs=0.001)
    assert rows[-1][-1] == "0.000 GB/s", "groups of one rank send nothing"


def run_collectives():
    commands = [
        ("nccl_all_to_all_v", "--elements=500"),
        ("nccl_all_gather_v", "--elements=500"),
        ("bandwidth_test", "--elements=4096", "--min_elements=1000"),
        ("bandwidth_test", "--elements=1000", "--min_elements=1000", "--group_count=3", "--collective", "all_gather"),
    ]
    return "".join(run_one(name, "--device=cpu", "--num_loops=2", *arguments) for name, *arguments in commands)
