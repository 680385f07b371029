"""Each example but helloworld, in one process: the lines it prints, its options, what training does to the loss.

helloworld, whose arguments and lines they share, has its own tests, and so have several ranks (tests/distributed).
Some are started as programs, as a module and as a file; what options do is tested by calling ``main``, which takes no
seconds to start.
"""

import importlib
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch
from pytest import fixture, mark, raises

from tutel import system

FOLDER = Path(__file__).parents[2] / "tutel" / "examples"
FOR_ONE = ["helloworld_amp", "helloworld_switch", "helloworld_from_scratch", "helloworld_custom_gate_expert"]
#: On one rank the same as helloworld.
LIKE_HELLOWORLD = ["helloworld_ddp", "helloworld_ddp_tutel", "helloworld_data_model"]
FOR_SEVERAL = [*LIKE_HELLOWORLD, "helloworld_custom_expert_sharded", "helloworld_megatron"]
EXAMPLES = FOR_ONE + FOR_SEVERAL
WITH_LAYER = [name for name in EXAMPLES if name not in ("helloworld_from_scratch", "helloworld_megatron")]
TINY = {"batch_size": 2, "num_tokens": 16, "model_dim": 8, "hidden_size": 12, "num_steps": 3, "device": "cpu"}
STEP = re.compile(r"STEP-(\d+): DONE, loss = (\S+), step_time = (\S+) sec, perf = \S+ tflops\.(.*)")


def words(*arguments, **options):
    # The number of experts is the same for all, whatever an example takes by default.
    options = {"num_local_experts": 2, **TINY, **options}
    return [*(f"--{name}={value}" for name, value in options.items()), *arguments]


def start(program, *arguments, cwd=None):
    """Start an example as a user does; with one thread, since other work on the machine stalls several."""
    command = [sys.executable, "-W", "error", *program, *words(*arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd)


@fixture
def run(capsys):
    """Call an example's main; give what it prints."""
    session, tf32 = dict(vars(system.init_data_model_parallel)), torch.backends.cuda.matmul.allow_tf32
    torch.set_num_threads(1)

    def run(name, *arguments, **options):
        capsys.readouterr()
        torch.set_default_dtype(torch.float32)
        importlib.import_module(f"tutel.examples.{name}").main(words(*arguments, **options))
        return capsys.readouterr().out

    yield run
    torch.backends.cuda.matmul.allow_tf32 = tf32
    vars(system.init_data_model_parallel).clear()
    vars(system.init_data_model_parallel).update(session)


def steps(printed):
    """Check the form of what an example prints; give each step's (loss, end of its line)."""
    lines = [line for line in printed.splitlines() if line and not line.startswith("[Checkpoint]")]
    assert re.fullmatch(r"\[Statistics\] param count for MoE local_experts = \d+, .* gate = \d+\.", lines[0])
    assert lines[1].startswith("[Benchmark] world_size = 1, ")
    found = [STEP.fullmatch(line) for line in lines[2:-1]]
    assert [int(match[1]) for match in found] == list(range(len(found)))
    assert all(float(match[3]) > 0 for match in found)
    assert re.fullmatch(r"\[Summary\] Average synchronized step_time = \S+ sec\.", lines[-1])
    return [(float(match[2]), match[4]) for match in found]


def losses(printed):
    return [loss for loss, _ in steps(printed)]


@mark.parametrize("name", FOR_ONE)
def test_as_a_module(name, run):
    done = start(["-m", f"tutel.examples.{name}"])
    assert (done.returncode, done.stderr) == (0, "")
    assert losses(done.stdout) == losses(run(name))


@mark.parametrize("name", EXAMPLES)
def test_as_a_file(name, run, tmp_path):
    done = start([str(FOLDER / f"{name}.py")], cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    found = losses(done.stdout)
    assert len(found) == TINY["num_steps"]
    assert found[0] > found[1] > found[2]
    assert losses(run(name)) == found


@mark.parametrize("name", LIKE_HELLOWORLD)
def test_one_rank_of_several_is_helloworld(name, run):
    assert losses(run(name, l_aux_wt=0.5)) == losses(run("helloworld", l_aux_wt=0.5))


def test_megatron_is_a_plain_network(run):
    torch.manual_seed(1)
    network = torch.nn.Sequential(torch.nn.Linear(8, 24), torch.nn.ReLU(), torch.nn.Linear(24, 8))
    torch.manual_seed(0)
    output = network(torch.randn(2, 16, 8))
    expected = torch.nn.functional.nll_loss(torch.log_softmax(output.sum(2), 1), torch.zeros(2, dtype=torch.int64))
    assert abs(first_loss(run, "helloworld_megatron") - expected.item()) < 1e-5


@mark.parametrize("name", ["bandwidth_test", "nccl_all_to_all_v", "nccl_all_gather_v"])
def test_collectives(name, capsys):
    arguments = ["--elements=5000", "--num_loops=2", "--device=cpu", "--local-rank=0"]
    importlib.import_module(f"tutel.examples.{name}").main(arguments)
    printed = capsys.readouterr().out.splitlines()
    if name == "bandwidth_test":
        assert printed[0].startswith("[Benchmark] world_size = 1, ")
        rows = [re.split(r"  +", line) for line in printed[2:]]
        assert [row[:2] for row in rows[:3]] == [["all_to_all", size] for size in ("4 KiB", "8 KiB", "16 KiB")]
        assert {row[0] for row in rows} == {"all_to_all", "all_gather", "reduce_scatter", "all_reduce", "broadcast"}
        assert {row[-1] for row in rows} == {"0.000 GB/s"}, "one rank sends nothing"
    else:
        assert printed[-1].startswith("[Summary] all elements are right")


@mark.parametrize("name", FOR_ONE)
def test_a_program_that_fails_exits_with_its_traceback(name):
    done = start(["-m", f"tutel.examples.{name}"], "--checkpoint_path=/dev/null/{rank}")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "/dev/null" in done.stderr.splitlines()[-1]
    assert "[Summary]" not in done.stdout


@mark.parametrize("name", EXAMPLES)
def test_forward_only_leaves_the_loss_as_it_is(name, run):
    evaluated = losses(run(name, "--eval", capacity_factor=0))
    assert len(set(evaluated)) == 1
    assert evaluated[0] == losses(run(name, capacity_factor=0))[0]


@mark.parametrize("name", EXAMPLES)
def test_checkpoints(name, run, tmp_path):
    pattern = f"{tmp_path}/made/{{rank}}-{{size}}.pt"
    run = partial(run, name, capacity_factor=0)
    assert "0-1.pt does not exist: the weights are new" in run(checkpoint=pattern, num_steps=2)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["0-1.pt"]
    torch.load(tmp_path / "made" / "0-1.pt", weights_only=True)
    later = run("--eval", checkpoint_path=pattern, num_steps=1)
    assert "weights read from" in later
    # The third step's loss, computed with the weights that two steps left.
    assert losses(later) == losses(run())[2:]


#: Options that all examples take: those that change the first loss, where nothing is dropped, and those that do not.
CHANGES = [
    {"top": 1},
    {"num_local_experts": 3},
    {"l_aux_wt": 0.5},
    {"capacity_factor": 0.5},
    {"hidden_size": 7},
    {"dtype": "float64"},
]
KEEPS = ["--capacity_factor=0", "--use_tensorcore", "--allreduce_degree=0", "--local_rank=-1", "--local-rank=0"]


def first_loss(run, name, *arguments, **options):
    return losses(run(name, *arguments, **{"num_steps": 1, "capacity_factor": 2, **options}))[0]


@mark.parametrize("options", CHANGES, ids=str)
@mark.parametrize("name", EXAMPLES)
def test_options_that_change_the_loss(name, options, run):
    changed = first_loss(run, name, **options) != first_loss(run, name)
    of_routing = not options.keys().isdisjoint({"top", "l_aux_wt", "capacity_factor"})
    assert changed != (name == "helloworld_megatron" and of_routing)


@mark.parametrize("name", EXAMPLES)
def test_options_that_do_not_change_the_loss(name, run):
    assert first_loss(run, name, *KEEPS) == first_loss(run, name)


@mark.parametrize("name", WITH_LAYER)
def test_options_of_the_layer(name, run):
    options = ["--a2a_ffn_overlap_degree=2", "--parallel_type=data", "--use_2dh", "--megablocks_size=4"]
    assert first_loss(run, name, *options) == first_loss(run, name)


@mark.parametrize("gate", [[], ["--fp32_gate"]], ids=["gate", "fp32_gate"])
@mark.parametrize("dtype", ["float16", "bfloat16"])
@mark.parametrize("name", EXAMPLES)
def test_half_types(name, dtype, gate, run):
    expected = first_loss(run, name)
    assert abs(first_loss(run, name, *gate, dtype=dtype) - expected) < 0.2 * expected


def test_amp_is_close_to_full_precision(run):
    exact, mixed = first_loss(run, "helloworld"), first_loss(run, "helloworld_amp")
    assert mixed != exact
    assert abs(mixed - exact) < 0.01 * exact


def test_switch_goes_through_all_settings(run):
    found = [end for _, end in steps(run("helloworld_switch", num_steps=65, capacity_factor=1.5))]
    settings = [tuple(map(float, re.fullmatch(r" \(f = (\S+), r = (\S+), o = (\S+)\)", end).groups())) for end in found]
    factors = (1.5, 1.875, 2.25, 3.0)
    assert set(settings) == {(f, r, o) for f in factors for r in (0, 1) for o in range(1, 9)}
    assert settings[64] == settings[0]


@mark.parametrize("activation", ["gelu", "silu"])
def test_options_of_custom_experts(activation, run):
    name = "helloworld_custom_gate_expert"
    assert first_loss(run, name, my_activ_type=activation) != first_loss(run, name)


def test_the_layer_by_hand_computes_what_the_layer_does(run):
    # Both draw their weights alike, with the same seeds.
    by_hand, by_layer = (
        first_loss(run, f"helloworld_{name}", l_aux_wt=0.5) for name in ("from_scratch", "custom_gate_expert")
    )
    assert abs(by_hand - by_layer) < 1e-5


@mark.parametrize(("option", "message"), [
    ("--batch_size=0", "--batch_size must be at least 1, got 0"),
    ("--dtype=int8", "invalid choice: 'int8'"),
    ("--no_such_option", "unrecognized arguments: --no_such_option"),
])  # fmt: skip
@mark.parametrize("name", EXAMPLES)
def test_bad_options(name, option, message, run, capsys):
    with raises(SystemExit) as ended:
        run(name, option)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@mark.parametrize("name", ["helloworld_from_scratch", "helloworld_custom_gate_expert"])
@mark.parametrize("count", ["0", "-2", "0.5", "two"])
def test_experts_that_cannot_be_shared(name, count, run, capsys):
    with raises(SystemExit):
        run(name, f"--num_local_experts={count}")
    assert f"--num_local_experts must be an integer of at least 1 here, got {count}" in capsys.readouterr().err


@mark.parametrize("name", EXAMPLES)
def test_help_names_the_defaults(name, run, capsys):
    with raises(SystemExit) as ended:
        run(name, "--help")
    assert not ended.value.code
    printed = " ".join(capsys.readouterr().out.split())
    assert all(f"(default: {value})" in printed for value in (16, 1024, 2048, 2, 100, 1.0, "float32"))
