"""docs/checkpoints.md: its commands and its program run, and its table has all options."""

import argparse
import importlib
import re
import shlex
from pathlib import Path

import pytest
import torch

from tutel import checkpoint, moe

PAGE = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text()
FFN = {"type": "ffn", "count_per_node": 4, "hidden_size_per_expert": 8}


def make_layer():
    return moe.moe_layer({"type": "top", "k": 2}, 6, FFN)


def test_the_commands_run_one_after_the_other(tmp_path, monkeypatch, capsys):
    pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    monkeypatch.chdir(tmp_path)
    state = make_layer().state_dict()
    Path("states").mkdir()
    for rank in range(4):
        torch.save(checkpoint.scatter_state(state, 4, rank), f"states/{rank}-of-4.ckpt")
    commands = re.findall(r"^python3 -m (tutel\.checkpoint\.\w+) (.*)$", PAGE, re.MULTILINE)
    assert len(commands) == 4
    for module, arguments in commands:
        importlib.import_module(module).main(shlex.split(arguments))
    assert "layer (the model): 4 experts" in capsys.readouterr().out
    safe = importlib.import_module("safetensors.torch")
    for found in (torch.load("all.ckpt", weights_only=True), safe.load_file("all.safetensors")):
        assert all(torch.equal(value, found[key]) for key, value in state.items())


def test_the_program_runs(tmp_path):
    [program] = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names = {}
    exec(program, names)
    layer, again = make_layer(), make_layer()
    optimizer, its_optimizer = (torch.optim.AdamW(each.parameters()) for each in (layer, again))
    layer(torch.randn(5, 6)).sum().backward()
    optimizer.step()
    with pytest.warns(UserWarning, match="assuming"):
        names["save"](layer, optimizer, tmp_path)
        names["load"](again, its_optimizer, tmp_path)
    for one, other in zip(layer.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
        assert torch.equal(optimizer.state[one]["exp_avg"], its_optimizer.state[other]["exp_avg"])


@pytest.mark.parametrize("command", ["gather", "scatter", "inspect"])
def test_the_table_has_all_options(monkeypatch, command):
    given = set()
    monkeypatch.setattr(
        argparse.ArgumentParser,
        "parse_args",
        lambda parser, _arguments: (given.update(*(a.option_strings for a in parser._actions)), parser.exit())[0],
    )
    with pytest.raises(SystemExit):
        importlib.import_module(f"tutel.checkpoint.{command}").main([])
    rows = re.findall(r"^\| (`--.*?) \| (.*?) \|", PAGE, re.MULTILINE)
    named = {
        option
        for options, commands in rows
        if command in commands or commands == "all"
        for option in re.findall(r"--\w+", options)
    }
    assert named == given - {"-h", "--help"}
