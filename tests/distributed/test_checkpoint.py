"""States that one number of ranks saves and another loads."""

import checkpoints
import pytest
import torch
from checkpoints import CASES
from ranks import run_ranks
from tutel.checkpoint import gather_files
from tutel.checkpoint.same import same


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoints of 4 and of 2 ranks, with what they contain beside them."""
    folders = {}
    for ranks in (4, 2):
        folders[ranks] = str(tmp_path_factory.mktemp(f"of{ranks}"))
        run_ranks(checkpoints.save, ranks, folders[ranks])
    return folders


@pytest.mark.parametrize(("saved_on", "ranks"), [(4, 1), (4, 2), (4, 3), (2, 4)])
def test_load_on_other_ranks(saved, saved_on, ranks):
    expected = sum(case.fits(ranks) and case.fits(saved_on) for case in CASES)
    assert expected >= 7
    assert run_ranks(checkpoints.load, ranks, saved[saved_on], saved_on) == [expected] * ranks


def test_load_on_imagined_ranks(saved):
    """On each of 8 ranks, and on some of 12, which have finer shares of an expert than were saved, or none of it."""
    for ranks, some in ((8, range(8)), (12, (0, 4, 11))):
        expected = sum(case.fits(ranks) and case.fits(4) for case in CASES)
        [counts] = run_ranks(checkpoints.load_imagined, 1, saved[4], 4, ranks, some, timeout=120)
        assert counts == [expected] * len(some)


def test_files_and_wrappers(tmp_path):
    """Four ranks' own files, gathered, are what a model in DDP, one with FSDP and replicas in groups save as well."""
    outputs = run_ranks(checkpoints.save_wrapped, 4, str(tmp_path))
    gather_files(f"{tmp_path}/{{rank}}-of-{{size}}.ckpt", 4, tmp_path / "all.ckpt")
    [found] = run_ranks(checkpoints.load_wrapped, 1, str(tmp_path))
    assert torch.equal(found, torch.cat(outputs))


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Layers with the gate `megatron` of 1 and of 2 ranks: the folder, and what each rank had."""
    found = {}
    for ranks in (1, 2):
        folder = str(tmp_path_factory.mktemp(f"parts_of{ranks}"))
        found[ranks] = folder, run_ranks(checkpoints.save_parts, ranks, folder)
    return found


@pytest.mark.parametrize(("saved_on", "ranks"), [(2, 1), (1, 2), (2, 2), (2, 3)])
def test_parts_of_one_expert(parts, saved_on, ranks):
    """However many ranks share its hidden units, it is the same function, and the optimizer's values are the same."""
    folder, saved = parts[saved_on]
    loaded = run_ranks(checkpoints.load_parts, ranks, folder)
    for copies in checkpoints.PARTS:
        before, after = ([rank[copies] for rank in every] for every in (saved, loaded))
        torch.testing.assert_close(
            torch.cat([rank.output for rank in after]), torch.cat([rank.output for rank in before]), rtol=1e-12, atol=0
        )
        assert before[0].state["1.experts.batched_fc2_bias"].any()
        assert before[0].state["state.1.experts.batched_fc2_bias.exp_avg"].any()
        for rank in after:
            assert rank.state.keys() == before[0].state.keys()
            for name, value in rank.state.items():
                if name.startswith("state.1.experts.batched_fc2_bias") and ranks == 3:  # a mean of three is rounded
                    torch.testing.assert_close(value, before[0].state[name], rtol=1e-15, atol=0)
                else:
                    assert same(value, before[0].state[name]), name
            # Each rank's bias makes a step: with another number of them, only what comes before the first is the same.
            losses = slice(None) if ranks == saved_on else slice(1)
            torch.testing.assert_close(rank.losses[losses], before[0].losses[losses], rtol=1e-10, atol=0)


def test_parts_in_files_are_the_same(parts, tmp_path):
    folder, saved = parts[2]
    for copies in checkpoints.PARTS:
        gather_files(f"{folder}/{copies}-{{rank}}-of-{{size}}.ckpt", 2, tmp_path / "all.ckpt", layout="megatron")
        for name, value in torch.load(tmp_path / "all.ckpt", weights_only=True).items():
            assert torch.equal(value, saved[0][copies].state[name].view_as(value)), name
