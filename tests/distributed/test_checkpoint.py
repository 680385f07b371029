"""States that one number of ranks saves and another loads."""

import checkpoints
import pytest
from checkpoints import CASES
from ranks import run_ranks


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
    """Of 8 and of 12 ranks, one after the other: finer shares of an expert than those saved, empty ones too."""
    for ranks in (8, 12):
        expected = sum(case.fits(ranks) and case.fits(4) for case in CASES)
        [counts] = run_ranks(checkpoints.load_imagined, 1, saved[4], 4, ranks, timeout=120)
        assert counts == [expected] * ranks
