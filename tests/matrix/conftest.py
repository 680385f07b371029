"""Which cases of the matrix run: a sample, or all of them with ``TUTEL_TEST_MATRIX=full`` in the environment."""

import os

from matrix.cases import sample


def pytest_generate_tests(metafunc):
    if "case" not in metafunc.fixturenames:
        return
    cases, more = metafunc.module.CASES, metafunc.module.SAMPLED_BEYOND_PAIRS
    wanted = os.environ.get("TUTEL_TEST_MATRIX", "sample")
    assert wanted in ("sample", "full"), f"TUTEL_TEST_MATRIX must be sample or full, got {wanted!r}"
    cases = list(cases) if wanted == "full" else sample(cases, more)
    metafunc.parametrize("case", cases, ids=str)
