"""What a checkpoint file contains: `inspect_file` and `python3 -m tutel.checkpoint.inspect`."""

import json

import pytest
import torch
from torch import nn
from tutel.checkpoint import CheckpointError, inspect, inspect_file, scatter_file

from tutel import moe

save_file = pytest.importorskip("safetensors.torch", reason="safetensors is not installed").save_file


@pytest.fixture
def model():
    experts = {"type": "ffn", "count_per_node": 4, "hidden_size_per_expert": 8}
    layers = [moe.moe_layer({"type": "top"}, 6, experts), moe.moe_layer({"type": "top"}, 6, [nn.Linear(6, 6)] * 2)]
    return nn.Sequential(nn.Linear(6, 6), *layers)


@pytest.mark.parametrize("kind", ["ckpt", "safetensors"])
def test_what_a_file_contains(tmp_path, model, kind):
    path = tmp_path / f"all.{kind}"
    state = {key: value.clone() for key, value in model.state_dict().items()}
    save_file(state, path) if kind == "safetensors" else torch.save({**state, "epoch": 3}, path)
    found = inspect_file(path, check=True)
    assert found.kind == ("safetensors" if kind == "safetensors" else "torch")
    first, second = sorted(found.layers, key=lambda layer: layer.name)
    assert (first.name, first.num_global_experts, first.num_experts) == ("1", 4, 4)
    assert (second.name, second.num_global_experts, second.num_experts) == ("2", 2, 2)
    fc1 = next(tensor for tensor in first.experts if tensor.name == "1.experts.batched_fc1_w")
    assert (fc1.shape, fc1.dtype, fc1.nbytes) == ((4, 8, 6), "float32", 768)
    assert first.nbytes == 4 * (8 * 6 + 6 * 8 + 8 + 6) * 4
    assert "0.weight" in [tensor.name for tensor in found.shared]
    assert found.nbytes == sum(value.nbytes for value in state.values())
    assert found.others == (() if kind == "safetensors" else ("epoch",))


def test_a_rank_of_several(tmp_path, model):
    torch.save(model[1].state_dict(), tmp_path / "all")
    for ranks, shape in ((2, (2, 8, 6)), (8, (1, 4, 6))):
        scatter_file(tmp_path / "all", ranks, f"{tmp_path}/{{rank}}")
        [layer] = inspect_file(tmp_path / "1").layers
        assert (layer.name, layer.num_global_experts, layer.num_experts) == ("", 4, shape[0])
        assert layer.experts[0].shape == shape


def test_the_command(tmp_path, model, capsys):
    torch.save({"model": model.state_dict(), "epoch": 3}, tmp_path / "all")
    arguments = [str(tmp_path / "all"), "--namespace=model"]
    inspect.main(arguments)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{tmp_path}/all: torch, 2.4 KiB"
    assert lines[1] == "layer 1: 4 experts, 1.7 KiB"
    assert lines[2].split() == ["1.experts.batched_fc1_w", "[4,", "8,", "6]", "float32", "768", "B"]
    assert any(line.startswith("shared: ") for line in lines)
    inspect.main([*arguments, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["layers"][0]["num_global_experts"] == 4
    assert found["layers"][0]["experts"][0]["shape"] == [4, 8, 6]


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(CheckpointError, match="all does not exist"):
        inspect_file(tmp_path / "all")
    with pytest.raises(SystemExit) as ended:
        inspect.main([str(tmp_path / "all")])
    assert ended.value.code == f"error: {tmp_path}/all does not exist"
    torch.save({"_num_global_experts": torch.tensor(0)}, tmp_path / "all")
    with pytest.raises(CheckpointError, match="all: '_num_global_experts' must be the number of experts, got 0"):
        inspect_file(tmp_path / "all")
    torch.save({"experts.w": torch.ones(2, 3)}, tmp_path / "all")
    assert inspect_file(tmp_path / "all").layers == ()
    assert inspect_file(tmp_path / "all", default_num_global_experts=2).layers[0].num_experts == 2


def test_sizes_are_written_for_people(tmp_path):
    from tutel.checkpoint.inspection import _bytes

    assert [_bytes(size) for size in (0, 1023, 1024, 1 << 31, 3 << 50)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "2.0 GiB",
        "3072.0 TiB",
    ]
