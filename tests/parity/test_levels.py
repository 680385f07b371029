"""The operators' values and gradients on every level of processor features below this machine's own."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from tutel._core import cpu_level

TESTS = Path(__file__).parent.parent
FILES = [
    TESTS / "parity/test_rows_parity.py",
    TESTS / "parity/test_routing_parity.py",
    TESTS / "unit/test_gradcheck.py",
]
ARM = platform.machine() in ("aarch64", "arm64")
LEVELS = ["portable", "neon"] if ARM else ["portable", "avx2", "avx512", "avx512_bf16"]
ON_LEVEL = """
import sys, pytest
from tutel._core import cpu_level
level, *files = sys.argv[1:]
if cpu_level() != level:
    sys.exit(f"on level {cpu_level()} instead of {level}")
sys.exit(pytest.main(["--quiet", "-p", "no:cacheprovider", *files]))
"""


def run(level, source, *arguments):
    """Run a program whose process never uses more than a level."""
    return subprocess.run(
        [sys.executable, "-c", source, *map(str, arguments)],
        env={**os.environ, "TUTEL_CPU_LEVEL": level},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS[: LEVELS.index(cpu_level())])
def test_operators_on_a_lower_level(level):
    finished = run(level, ON_LEVEL, level, *FILES)
    assert finished.returncode == 0, finished.stdout + finished.stderr


def test_a_level_of_another_architecture_limits_nothing():
    finished = run("avx2" if ARM else "neon", "from tutel._core import cpu_level; print(cpu_level())")
    assert finished.stdout.strip() in LEVELS[1:] or cpu_level() == "portable", finished.stderr


def test_an_unknown_level_is_refused():
    finished = run("sse", "import tutel")
    assert finished.returncode == 1
    assert 'unknown level "sse"' in finished.stderr
    assert all(name in finished.stderr for name in LEVELS)
