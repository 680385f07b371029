"""The commands `tutel.checkpoint.gather` and `.scatter`: kinds of files, refusals, what is left on the disk."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from reference import random_values
from tutel.checkpoint import CheckpointError, files, gather, gather_files, scatter, scatter_file

from tutel import moe

E, D, H = 4, 6, 8
SAFETENSORS = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")


@pytest.fixture
def layer():
    experts = {"type": "ffn", "count_per_node": E, "hidden_size_per_expert": H}
    return moe.moe_layer({"type": "top", "k": 2}, D, experts, seeds=(1, 2, 3))


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        SAFETENSORS.save_file(content, path)
    else:
        torch.save(content, path)


def read(path):
    return SAFETENSORS.load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


def assert_same(left, right):
    assert left.keys() == right.keys()
    for key, value in left.items():
        assert torch.equal(value, right[key]), key


def run(command, *arguments):
    """Run a command in this process; return its status and what it says if it fails."""
    try:
        command.main([str(argument) for argument in arguments])
    except SystemExit as error:
        return error.code
    return 0


def there(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# --- Kinds of files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2, 8])
@pytest.mark.parametrize("inner", ["ckpt", "safetensors"])
@pytest.mark.parametrize("outer", ["ckpt", "safetensors"])
def test_commands_there_and_back(tmp_path, layer, outer, inner, ranks):
    start, end = tmp_path / f"start.{outer}", tmp_path / f"end.{outer}"
    pattern = tmp_path / "ranks" / f"{{rank}}-of-{{size}}.{inner}"
    write(start, layer.state_dict())
    assert run(scatter, f"--input={start}", "--output_size", ranks, f"--outputs={pattern}") == 0
    assert there(tmp_path / "ranks") == [f"{rank}-of-{ranks}.{inner}" for rank in range(ranks)]
    assert run(gather, f"--inputs={pattern}", "--input_size", ranks, "--output", end) == 0
    assert_same(read(end), layer.state_dict())
    assert there(tmp_path) == sorted([start.name, end.name, *(f"ranks/{name}" for name in there(tmp_path / "ranks"))])
    other = moe.moe_layer({"type": "top", "k": 2}, D, {"count_per_node": E, "hidden_size_per_expert": H})
    other.load_state_dict(read(end), strict=True)
    tokens = random_values((5, D), torch.float32)
    assert torch.equal(other(tokens), layer(tokens))


def test_a_share_takes_its_own_room_only(tmp_path, layer):
    """A file holds all memory that its tensors are parts of, if nobody sees to it."""
    write(tmp_path / "all", layer.state_dict())
    scatter_file(tmp_path / "all", 4, f"{tmp_path}/{{rank}}")
    stored = read(tmp_path / "3")["experts.batched_fc1_w"]
    assert stored.untyped_storage().nbytes() == stored.nbytes == H * D * 4


def test_tied_weights(tmp_path, layer):
    shared = torch.ones(3, 3)
    state = {**layer.state_dict(), "input": shared, "output": shared}
    for kind in ("ckpt", "safetensors"):
        torch.save(state, tmp_path / "all")
        scatter_file(tmp_path / "all", 2, f"{tmp_path}/{{rank}}.{kind}")
        loaded = read(tmp_path / f"1.{kind}")
        assert torch.equal(loaded["input"], loaded["output"])
        tied = loaded["input"].data_ptr() == loaded["output"].data_ptr()
        assert tied == (kind == "ckpt")


def test_files_of_old_torch(tmp_path, layer):
    torch.save(layer.state_dict(), tmp_path / "0", _use_new_zipfile_serialization=False)
    gather_files(f"{tmp_path}/{{rank}}", 1, tmp_path / "all")
    assert_same(read(tmp_path / "all"), layer.state_dict())


def test_without_safetensors(tmp_path, layer, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    write(tmp_path / "all", layer.state_dict())
    said = run(scatter, f"--input={tmp_path}/all", "--output_size=2", f"--outputs={tmp_path}/{{rank}}.safetensors")
    assert said == f"error: {tmp_path}/0.safetensors needs the package safetensors (pip install 'tutel[safetensors]')"
    assert there(tmp_path) == ["all"]


def test_safetensors_hold_tensors_only(tmp_path, layer):
    write(tmp_path / "all", {**layer.state_dict(), "epoch": 3, "name": "x", "args": {}})
    with pytest.raises(CheckpointError, match=r"can hold tensors only, not name \(str\), args \(dict\)"):
        scatter_file(tmp_path / "all", 2, f"{tmp_path}/{{rank}}.safetensors")
    assert there(tmp_path) == ["all"]
    write(tmp_path / "all", {**layer.state_dict(), "epoch": 3})
    scatter_file(tmp_path / "all", 2, f"{tmp_path}/{{rank}}.safetensors")
    assert read(tmp_path / "0.safetensors")["epoch"] == 3


# --- Entries ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("namespace", ["model", "a/model", "/a/b/model/"])
def test_namespace(tmp_path, layer, namespace):
    steps = [name for name in namespace.split("/") if name]
    root = layer.state_dict()
    for name in reversed(steps):
        root = {name: root, "epoch": 3}
    write(tmp_path / "all", root)
    options = ["--namespace", namespace]
    assert run(scatter, f"--input={tmp_path}/all", "--output_size=2", f"--outputs={tmp_path}/{{rank}}", *options) == 0
    assert run(gather, f"--inputs={tmp_path}/{{rank}}", "--input_size=2", f"--output={tmp_path}/again", *options) == 0
    again = read(tmp_path / "again")
    for name in steps:
        assert again["epoch"] == 3
        again = again[name]
    assert_same(again, layer.state_dict())


def test_namespace_with_safetensors(tmp_path, layer):
    """They have no entries: the state moves into one, or out of it."""
    write(tmp_path / "all", {"model": layer.state_dict(), "epoch": 3})
    with pytest.warns(UserWarning, match=r"0\.safetensors holds the state only: epoch left out"):
        scatter_file(tmp_path / "all", 1, f"{tmp_path}/{{rank}}.safetensors", namespace="model")
    gather_files(f"{tmp_path}/{{rank}}.safetensors", 1, tmp_path / "again", namespace="model")
    assert list(read(tmp_path / "again")) == ["model"]
    assert_same(read(tmp_path / "again")["model"], layer.state_dict())


def test_other_entries_must_be_the_same(tmp_path, layer):
    write(tmp_path / "all", {"model": layer.state_dict(), "args": {"lr": 1.0}})
    scatter_file(tmp_path / "all", 2, f"{tmp_path}/{{rank}}", namespace="model")
    write(tmp_path / "1", {**read(tmp_path / "1"), "optimizer": {"state": {0: torch.ones(1)}}})
    options = [f"--inputs={tmp_path}/{{rank}}", "--input_size=2", f"--output={tmp_path}/again", "--namespace=model"]
    said = run(gather, *options)
    assert said.startswith("error: entries beside the state are not the same on all ranks: optimizer (allow_different=")
    assert run(gather, *options, "--allow_different=drop") == 0
    assert read(tmp_path / "again").keys() == {"model", "args"}
    assert run(gather, *options, "--allow_different=first") == 0
    assert read(tmp_path / "again")["optimizer"] is None


def test_older_files_need_their_number_of_experts(tmp_path, layer):
    state = {f"block.{key}": value for key, value in layer.state_dict().items() if not key.startswith("_num")}
    write(tmp_path / "all", state)
    options = [f"--input={tmp_path}/all", "--output_size=2", f"--outputs={tmp_path}/{{rank}}"]
    assert "default_num_global_experts" in run(scatter, *options)
    assert run(scatter, *options, "--default_num_global_experts=4") == 0
    assert read(tmp_path / "0")["block._num_global_experts"] == 4
    assert "its shape is [4, 8, 6], but there are 2 experts" in run(scatter, *options, "--default_num_global_experts=2")


# --- What is refused -------------------------------------------------------------------------------------------------


def truncate(path):
    path.write_bytes(path.read_bytes()[:-200])


def flip(path):
    """Change one byte of a weight."""
    content = bytearray(path.read_bytes())
    weight = read(path)["experts.batched_fc1_w"].numpy().tobytes()
    content[content.index(weight[:64]) + 5] ^= 1
    path.write_bytes(content)


def forget(path):
    state = read(path)
    del state["experts.batched_fc1_w"]
    write(path, state)


class Thing:
    pass


DAMAGE = {
    "missing": (lambda path: path.unlink(), "1{} does not exist"),
    "folder": (lambda path: (path.unlink(), path.mkdir()), "1{} is no file"),
    "truncated": (truncate, "1{} is damaged, or no such file"),
    "empty": (lambda path: path.write_bytes(b""), "1{} is damaged, or no such file"),
    "text": (lambda path: path.write_text("hello" * 100), "1{} is damaged, or no such file"),
    "key": (forget, "1{}) lacks experts.batched_fc1_w"),
    "bit": (flip, "1{} is damaged, or no such file: wrong checksum of"),
    "object": (lambda path: torch.save({"a": Thing()}, path), "1{} is damaged, or no such file: Weights only"),
    "list": (lambda path: torch.save([1], path), "1{} must hold a state dict, got list"),
    "numbers": (lambda path: torch.save({1: 2}, path), "1{} must hold a state dict"),
}
TORCH_ONLY = {"bit", "object", "list", "numbers"}  # the other kind has no checksums and no objects


@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, name) for kind in ("", ".safetensors") for name in DAMAGE if not (kind and name in TORCH_ONLY)],
)
def test_damaged_sets(tmp_path, layer, kind, name):
    write(tmp_path / "all", layer.state_dict())
    scatter_file(tmp_path / "all", 2, f"{tmp_path}/{{rank}}{kind}")
    damage, message = DAMAGE[name]
    damage(tmp_path / f"1{kind}")
    before = there(tmp_path)
    said = run(gather, f"--inputs={tmp_path}/{{rank}}{kind}", "--input_size=2", f"--output={tmp_path}/again")
    assert said.startswith("error: the set is ")
    assert message.format(kind) in said
    assert "rank 1" in said
    assert there(tmp_path) == before


def test_all_missing_files_are_named(tmp_path, layer):
    write(tmp_path / "all", layer.state_dict())
    scatter_file(tmp_path / "all", 4, f"{tmp_path}/{{rank}}")
    for rank in (1, 3):
        (tmp_path / str(rank)).unlink()
    said = run(gather, f"--inputs={tmp_path}/{{rank}}", "--input_size=4", f"--output={tmp_path}/again")
    assert said.splitlines() == [
        "error: the set is damaged or incomplete:",
        f"  rank 1: {tmp_path}/1 does not exist",
        f"  rank 3: {tmp_path}/3 does not exist",
    ]


def test_a_flipped_bit_passes_unchecked(tmp_path, layer):
    """What the check is for."""
    write(tmp_path / "0", layer.state_dict())
    flip(tmp_path / "0")
    gather_files(f"{tmp_path}/{{rank}}", 1, tmp_path / "again", check=False)
    assert not torch.equal(read(tmp_path / "again")["experts.batched_fc1_w"], layer.experts.batched_fc1_w)


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        (
            scatter,
            ["--input=all", "--output_size=2", "--outputs=x"],
            "outputs must contain {rank} for 2 ranks, got 'x'",
        ),
        (scatter, ["--input=all", "--output_size=0", "--outputs={rank}"], "output_size must be at least 1, got 0"),
        (gather, ["--inputs=x", "--input_size=2", "--output=y"], "inputs must contain {rank} for 2 ranks, got 'x'"),
        (
            gather,
            ["--inputs=x", "--input_size=1", "--output=y", "--shard_dim=w"],
            "--shard_dim must be NAME=DIM, got 'w'",
        ),
        (scatter, ["--input=none", "--output_size=2", "--outputs={rank}"], "none does not exist"),
        (scatter, ["--input=all", "--output_size=3", "--outputs={rank}"], "cannot be divided over 3 ranks"),
        (scatter, ["--input=all", "--output_size=2", "--outputs={rank}", "--namespace=a"], "all has no entry 'a'"),
    ],
)
def test_bad_command_lines(tmp_path, monkeypatch, layer, command, arguments, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "all", layer.state_dict())
    said = run(command, *arguments)
    assert said.startswith("error: ")
    assert message in said
    assert there(tmp_path) == ["all"]


def test_shard_dim_from_the_command_line(tmp_path):
    state = {"_num_global_experts": torch.tensor(1), "experts.a.w": random_values((1, 3, 4))}
    write(tmp_path / "all", state)
    options = [f"--outputs={tmp_path}/{{rank}}", "--shard_dim=a.w=2"]
    assert run(scatter, f"--input={tmp_path}/all", "--output_size=2", *options) == 0
    assert torch.equal(read(tmp_path / "1")["experts.a.w"], state["experts.a.w"][:, :, 2:])


# --- What stays on the disk ------------------------------------------------------------------------------------------


def test_outputs_appear_together_or_not_at_all(tmp_path):
    (tmp_path / "0").write_text("as it was")
    with pytest.raises(ZeroDivisionError), files.Outputs() as outputs:
        outputs.add(tmp_path / "0", {"a": torch.ones(1)})
        outputs.add(tmp_path / "b" / "1", {"a": torch.ones(1)})
        assert (tmp_path / "0").read_text() == "as it was"
        _ = 1 / 0
    assert there(tmp_path) == ["0"]
    assert (tmp_path / "0").read_text() == "as it was"
    with files.Outputs() as outputs:
        outputs.add(tmp_path / "0", {"a": torch.ones(1)})
        outputs.add(tmp_path / "b" / "1", {"a": torch.ones(1)})
        assert not (tmp_path / "b" / "1").exists()
    assert there(tmp_path) == ["0", "b/1"]


def test_a_full_disk(tmp_path, layer, monkeypatch):
    write(tmp_path / "all", layer.state_dict())
    original, calls = torch.save, []

    def save(content, path):
        calls.append(path)
        original(content, path)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", save)
    said = run(scatter, f"--input={tmp_path}/all", "--output_size=4", f"--outputs={tmp_path}/{{rank}}")
    assert said == "error: [Errno 28] No space left on device"
    assert len(calls) == 3
    assert there(tmp_path) == ["all"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_command_that_is_stopped(tmp_path, number):
    """It is stopped once its first file is written; nothing of it stays."""
    program = f"""
import os, signal, sys, time
from tutel.checkpoint import files, scatter
# Programs in the background of a shell ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)
add = files.Outputs.add
def slow(self, path, content):
    add(self, path, content)
    print(path, flush=True)
    time.sleep(60)
files.Outputs.add = slow
scatter.main(["--input={tmp_path}/all", "--output_size=2", "--outputs={tmp_path}/{{rank}}"])
"""
    write(tmp_path / "all", {"_num_global_experts": torch.tensor(2), "experts.w": torch.ones(2, 3)})
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().strip() == f"{tmp_path}/0"
    assert len(there(tmp_path)) == 2
    process.send_signal(number)
    assert process.wait(30) == 128 + number
    process.stdout.close()
    assert there(tmp_path) == ["all"]


def test_as_modules(tmp_path, layer):
    """The commands of the README of old, in processes of their own, and a warning as one line."""
    old = {"0.fc1_weight": torch.ones(2, 8, 6), "0.fc2_weight": torch.ones(2, 8, 6)}
    for rank in range(2):
        write(tmp_path / f"x.rank{rank}", {"model": {f"a.experts.{key}": value for key, value in old.items()}})
    options = ["tutel.checkpoint.gather", "--namespace", "model", "--default_num_global_experts=4", "--input_size=2"]
    options += [f"--inputs={tmp_path}/x.rank{{rank}}", f"--output={tmp_path}/all"]
    command = [sys.executable, "-W", "error::RuntimeWarning", "-m"]
    gathered = subprocess.run(
        [*command, *options],
        capture_output=True,
        text=True,
        env={key: value for key, value in os.environ.items() if key != "PYTHONWARNINGS"},
        timeout=60,
    )
    assert gathered.returncode == 0, gathered.stderr
    assert gathered.stdout == f"{tmp_path}/all: the state of 2 ranks\n"
    assert gathered.stderr == "warning: the experts of layer 'a' are in the layout of v0.1.5\n"
    assert read(tmp_path / "all")["model"]["a.experts.batched_fc1_w"].shape == (4, 8, 6)


def test_progress_is_shown_on_a_terminal_if_it_takes_long(tmp_path, layer, monkeypatch, capsys):
    from tutel.checkpoint import convert

    write(tmp_path / "all", layer.state_dict())
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    scatter_file(tmp_path / "all", 2, f"{tmp_path}/{{rank}}")
    assert capsys.readouterr().err == ""
    original = convert.scatter_state

    def slow(*args, **options):
        time.sleep(0.6)
        return original(*args, **options)

    monkeypatch.setattr(convert, "scatter_state", slow)
    scatter_file(tmp_path / "all", 4, f"{tmp_path}/{{rank}}")
    assert "scatter" in capsys.readouterr().err
