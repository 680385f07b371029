"""``helloworld`` as a program: its arguments, the lines it prints, its exit status."""

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tutel.examples import helloworld

TINY = ["--batch_size=2", "--num_tokens=8", "--model_dim=16", "--hidden_size=12", "--num_steps=3", "--device=cpu"]
PROGRAM = (sys.executable, "-m", "tutel.examples.helloworld")
STEP = re.compile(r"STEP-(\d+): DONE, loss = (\S+), step_time = (\S+) sec, perf = (\S+) tflops\.", re.MULTILINE)


@functools.cache
def run(*arguments, program=PROGRAM, cwd=None):
    return subprocess.run(
        [*program, *TINY, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def losses_of(finished):
    assert finished.returncode == 0, finished.stderr
    return [float(loss) for _, loss, _, _ in STEP.findall(finished.stdout)]


def test_printed_lines():
    finished = run("--num_steps=12")
    assert finished.returncode == 0, finished.stderr
    lines = [line for line in finished.stdout.splitlines() if line]
    assert re.match(r"\[Statistics\] param count ", lines[0])
    assert re.match(r"\[Benchmark\] world_size = 1, .*model_dim = 16", lines[1])
    steps = STEP.findall(finished.stdout)
    assert [int(number) for number, *_ in steps] == list(range(12))
    assert all(float(value) > 0 for _, *values in steps for value in values[:2])
    # As programs read them: by white space.
    words = lines[2].replace(",", "").split()
    assert float(words[words.index("loss") + 2]) == float(steps[0][1])
    assert float(words[words.index("step_time") + 2]) == float(steps[0][2])
    assert repr(float(steps[0][1])) == steps[0][1], "in full precision"
    summary = re.fullmatch(r"\[Summary\] Average synchronized step_time = (\S+) sec\.", lines[-1])
    last_ten = [float(step_time) for _, _, step_time, _ in steps[-10:]]
    assert float(summary[1]) == pytest.approx(sum(last_ten) / 10, abs=1e-5)
    # No progress bar when piped.
    assert "\r" not in finished.stdout + finished.stderr
    assert "it/s" not in finished.stderr
    assert finished.stderr == ""


def test_runs_train():
    losses = losses_of(run())
    assert losses == sorted(losses, reverse=True)
    assert len(set(losses)) == 3


ARGUMENTS = [
    ["--local_rank=0"],
    ["--local-rank=0"],
    ["--num_local_experts=1"],
    ["--num_local_experts", "3"],
    ["--dtype=float64"],
    ["--dtype=bfloat16"],
    ["--dtype=float16", "--fp32_gate"],
    ["--top=1"],
    ["--l_aux_wt=0.1"],
    ["--a2a_ffn_overlap_degree=2"],
    ["--capacity_factor=0"],
    ["--capacity_factor=-1.5"],
    ["--parallel_type=data"],
    ["--parallel_type=adaptive:0"],
    ["--use_2dh"],
    ["--megablocks_size=1"],
    ["--allreduce_degree=0"],
    ["--use_tensorcore"],
    ["--expert_type=ffn"],
]


def test_every_argument_is_accepted():
    # One process for all: starting one takes longer than the run.
    source = f"""
from tutel.examples import helloworld
for arguments in {ARGUMENTS!r}:
    helloworld.main({TINY!r} + ["--num_steps=1"] + arguments)
"""
    finished = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=300, check=False)
    assert finished.returncode == 0, finished.stderr
    assert len(STEP.findall(finished.stdout)) == len(ARGUMENTS)
    assert "nan" not in finished.stdout


def test_eval_does_not_train():
    losses = losses_of(run("--eval"))
    assert len(losses) == 3
    assert len(set(losses)) == 1


def test_checkpoint_is_written_and_read(tmp_path):
    path = tmp_path / "weights.pt"
    first = losses_of(run(f"--checkpoint_path={path}"))
    assert [entry.name for entry in tmp_path.iterdir()] == ["weights.pt"], "nothing unfinished is left"
    second = losses_of(run(f"--checkpoint={path}"))
    assert max(second) < min(first), "training goes on where it ended"
    stored = path.read_bytes()
    evaluated = losses_of(run(f"--checkpoint_path={path}", "--eval"))
    assert evaluated[0] < min(second)
    assert path.read_bytes() == stored, "evaluation writes nothing"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtype=int8"], "invalid choice: 'int8'"),
        (["--batch_size=0"], "--batch_size must be at least 1, got 0"),
        (["--num_steps=-1"], "--num_steps must be at least 1, got -1"),
        (["--top=0"], "--top must be at least 1, got 0"),
        (["--top=x"], "invalid int value: 'x'"),
        (["--no_such_argument"], "unrecognized arguments: --no_such_argument"),
        (["--device=tpu"], "invalid choice: 'tpu'"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        helloworld.main([*TINY, *arguments])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_exit_status_of_bad_arguments():
    finished = run("--top=0")
    assert finished.returncode == 2
    assert "Traceback" not in finished.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num_local_experts=0"], "must not be 0"),
        (["--num_local_experts=-2"], "2 ranks share one expert"),
        (["--capacity_factor=nan"], "must be finite, got nan"),
        (["--parallel_type=both"], "parallel_type must be"),
    ],
)
def test_options_that_the_layer_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        helloworld.main([*TINY, *arguments])


def test_a_program_that_crashes_does_not_exit_with_0(tmp_path):
    path = tmp_path / "weights.pt"
    path.write_bytes(b"this is no checkpoint")
    finished = run(f"--checkpoint_path={path}")
    assert finished.returncode not in (0, 2)
    assert "Traceback" in finished.stderr
    assert path.read_bytes() == b"this is no checkpoint"


def test_as_a_file_in_a_clone():
    root = Path(__file__).parents[2]
    file = root / "tutel" / "examples" / "helloworld.py"
    if not file.exists():
        pytest.skip("not a clone of the repository")
    finished = run(program=(sys.executable, f"./{file.relative_to(root)}"), cwd=root)
    assert losses_of(finished) == losses_of(run())


def test_help_names_every_argument(capsys):
    with pytest.raises(SystemExit) as caught:
        helloworld.main(["--help"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    for argument in ARGUMENTS:
        assert argument[0].partition("=")[0] in printed
