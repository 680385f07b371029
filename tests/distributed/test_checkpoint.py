"""States that one number of ranks saves and another loads."""

import checkpoints
import pytest
import torch
from checkpoints import CASES
from ranks import run_ranks
from tutel.checkpoint import gather_files


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
