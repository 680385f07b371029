"""What `import tutel` does and says."""

import sys
from pathlib import Path

import pytest
from environments import run

import tutel

PACKAGE = Path(tutel.__file__).parent


def import_alone(tmp_path: Path, torch: str | None) -> str:
    """Import tutel where nothing else is installed but a pretended torch; return the last line printed."""
    (tmp_path / "tutel").symlink_to(PACKAGE)
    if torch is not None:
        (tmp_path / "torch").mkdir()
        (tmp_path / "torch" / "__init__.py").write_text(torch)
    # -S: without site-packages; PYTHONPATH is read all the same.
    printed = run([sys.executable, "-S", "-c", "import tutel"], env={"PYTHONPATH": str(tmp_path)}, status=1)
    assert "During handling" not in printed
    return printed.splitlines()[-1]


def test_without_torch(tmp_path: Path) -> None:
    assert import_alone(tmp_path, None) == (
        "ImportError: tutel needs PyTorch 2.10 or newer, which is not installed (pip install 'torch>=2.10')"
    )


@pytest.mark.parametrize("version", ["2.9.1+cu126", "1.13.0"])
def test_with_a_torch_too_old(tmp_path: Path, version: str) -> None:
    found = import_alone(tmp_path, f"__version__ = {version!r}")
    assert found == f"ImportError: tutel needs PyTorch 2.10 or newer, found {version}"


def test_with_a_torch_that_lacks_something_itself(tmp_path: Path) -> None:
    assert import_alone(tmp_path, "import sympy") == "ModuleNotFoundError: No module named 'sympy'"


@pytest.mark.parametrize("module", ["tutel", "tutel.moe"])
def test_is_silent_with_every_warning_an_error(module: str) -> None:
    assert run([sys.executable, "-W", "error", "-c", f"import {module}"]) == ""


@pytest.mark.parametrize("module", ["tutel", "tutel.moe", "tutel.functional"])
def test_brings_in_nothing_but_itself(module: str) -> None:
    """Its cost is then its own modules' only, whatever the machine: torch's compiler, for one, takes seconds."""
    program = f"""
import sys, torch
before = set(sys.modules)
import {module}
added = set(sys.modules) - before
print(*sorted(name for name in added if name.split(".")[0] not in ("tutel", *sys.stdlib_module_names)))
"""
    assert run([sys.executable, "-c", program]).split() == []


def test_version_is_the_workspaces(repository: Path) -> None:
    assert f'\nversion = "{tutel.__version__}"\n' in (repository / "Cargo.toml").read_text()
