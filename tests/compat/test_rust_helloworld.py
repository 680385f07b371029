"""``helloworld`` of the crate ``tutel-moe``, which trains the same model without Python: the same losses."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import torch

from tutel.examples import helloworld

REPOSITORY = Path(__file__).parents[2]
SMALL = ["--batch_size=2", "--num_tokens=64", "--model_dim=48", "--hidden_size=80", "--num_steps=4"]
LOSS = re.compile(r"STEP-\d+: DONE, loss = (\S+), step_time = \S+ sec, perf = \S+ tflops\.")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def program():
    if not (REPOSITORY / "crates" / "tutel-moe").exists():
        pytest.skip("not a clone of the repository")
    command = ["cargo", "build", "--quiet", "--release", "--locked", "-p", "tutel-moe", "--example", "helloworld"]
    command += ["--message-format=json"]
    built = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    messages = [json.loads(line) for line in built.stdout.splitlines()]
    [path] = [message["executable"] for message in messages if message.get("executable")]
    return path


def run(program, *arguments):
    return subprocess.run([program, *SMALL, *arguments], capture_output=True, text=True, timeout=300, check=False)


def losses_of(printed):
    return [float(loss) for loss in LOSS.findall(printed)]


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--dtype=float64"],
        ["--dtype=float16"],
        ["--dtype=bfloat16"],
        ["--top=1"],
        ["--top=2", "--num_local_experts=1"],
        ["--top=3", "--num_local_experts=7", "--capacity_factor=0"],
        ["--num_local_experts=5", "--capacity_factor=-0.7", "--dtype=float64"],
        ["--l_aux_wt=10", "--num_local_experts=4"],
        ["--eval"],
        ["--batch_size=1", "--num_tokens=7", "--model_dim=5", "--hidden_size=3"],  # tokens no multiple of 16
    ],
    ids=" ".join,
)
def test_losses_are_those_of_the_python_example(program, arguments, capsys):
    ours = run(program, *arguments)
    assert ours.returncode == 0, ours.stderr
    helloworld.main([*SMALL, *arguments, "--device=cpu"])
    expected = losses_of(capsys.readouterr().out)
    dtype = next((text.partition("=")[2] for text in arguments if text.startswith("--dtype")), "float32")
    # Tokens are drawn in fp32 for every dtype, and torch's differ from exact ones by its approximations.
    eps = max(torch.finfo(getattr(torch, dtype)).eps, torch.finfo(torch.float32).eps)
    assert len(expected) == 4
    assert losses_of(ours.stdout) == pytest.approx(expected, rel=8 * eps if dtype.endswith(("32", "64")) else 2 * eps)


def test_printed_lines(program, capsys):
    printed = run(program).stdout
    helloworld.main([*SMALL, "--device=cpu"])
    expected = capsys.readouterr().out

    def shape(text):
        return [re.sub(r"[0-9.e+-]+", "#", line) for line in text.splitlines() if "[Benchmark]" not in line]

    assert shape(printed) == shape(expected)
    [settings] = re.findall(r"\[Benchmark\] (.*)", printed)
    [all_settings] = re.findall(r"\[Benchmark\] (.*)", expected)
    assert set(settings.split(", ")) <= set(all_settings.split(", "))


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--batch_size=0"], 2, "must be at least 1"),
        (["--dtype=int8"], 2, "invalid value 'int8'"),
        (["--top=x"], 2, "must be a whole number of at least 1"),
        (["--no_such_argument"], 2, "unexpected argument '--no_such_argument'"),
        (["--capacity_factor=nan"], 1, "capacity_factor must be finite"),
    ],
)
def test_bad_arguments(program, arguments, status, message):
    finished = run(program, *arguments)
    assert finished.returncode == status
    assert message in finished.stderr
