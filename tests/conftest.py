"""What all tests share: reproducible examples, and torch's global settings as they were."""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

# Workers of pytest-xdist share the processors: each takes one, and so do programs that it starts, except in tests of
# threads, which set how many they want.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

# The same examples in every run: a failure in CI is the failure at home.
settings.register_profile(
    "repeatable", derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _torch_as_it_was(monkeypatch):
    """Each test starts from the same global settings and cannot pass its own on."""
    for name in ("CAP_FACTOR", "BATCH_PRIO", "SKIP_MOE", "SKIP_EXPERT", "ONES_GATE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(dtype)
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


@pytest.fixture
def fresh_compiler():
    """Nothing that was compiled before, and nothing left behind."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
