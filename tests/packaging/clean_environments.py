"""Try a wheel where nothing else of ours is: in a fresh environment with the oldest torch.

``python clean_environments.py FOLDER`` takes the wheel in FOLDER. Environments stand in the repository's root as
``.venv-<python>-<torch>`` and are used again where they are there; only the wheel is installed anew.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
OLDEST_PYTHON = (3, 10)
OLDEST_TORCH = "2.10"
REQUIREMENTS = [f"torch=={OLDEST_TORCH}.*", "pytest>=8", "pytest-xdist>=3.6", "hypothesis>=6.100", "numpy>=1.26"]
TESTS = ["tests/unit", "tests/parity"]
WORKERS = ["--numprocesses=logical", "--maxprocesses=4", "--dist=loadfile"]


def oldest_python() -> str | None:
    """Find an interpreter of the oldest Python that is supported."""
    name = ".".join(map(str, OLDEST_PYTHON))
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    for candidate in [shutil.which(f"python{name}"), *sorted(pyenv.glob(f"versions/{name}.*/bin/python{name}"))]:
        # A command of this name may be a stand-in that starts nothing: ask it.
        if (
            candidate
            and subprocess.run([candidate, "-c", "import venv, ensurepip"], capture_output=True).returncode == 0
        ):
            return str(candidate)
    return None


def call(python: Path, *arguments: str | Path) -> None:
    """Run a Python program in the repository; say what failed and stop if it does."""
    command = [str(python), *map(str, arguments)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        sys.exit(f"failed with status {done.returncode}: {' '.join(command)}")


def try_wheel(wheel: Path, interpreter: str, python_name: str) -> None:
    """Install the wheel in one environment and run its tests there."""
    folder = REPOSITORY / f".venv-{python_name}-torch{OLDEST_TORCH}"
    print(f"== {wheel.name} in {folder.name}", flush=True)
    python = folder / "bin" / "python"
    ready = folder / ".ready"  # written last: an installation that was cut off is made anew
    if not ready.exists() or ready.read_text() != "\n".join(REQUIREMENTS):
        call(Path(interpreter), "-m", "venv", "--clear", folder)
        call(python, "-m", "pip", "install", "--quiet", "--upgrade", "pip")
        call(python, "-m", "pip", "install", "--quiet", *REQUIREMENTS)
        ready.write_text("\n".join(REQUIREMENTS))
    # First as a user would, so that dependencies are fetched; then again, since the version stays between builds.
    call(python, "-m", "pip", "install", "--quiet", wheel)
    call(python, "-m", "pip", "install", "--quiet", "--force-reinstall", "--no-deps", wheel)
    call(python, "tests/packaging/error_paths.py")
    started = time.monotonic()
    # What takes long or much memory says the same in every environment: once, in the developer's, is enough.
    call(python, "-m", "pytest", "--quiet", "-p", "no:cacheprovider", *WORKERS, "-m", "not slow", *TESTS)
    print(f"== {folder.name} passed ({time.monotonic() - started:.0f} s of tests)", flush=True)


def main() -> None:
    """Try the wheel with the oldest Python that there is; .venv tries it with the newest torch (make test-python)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the wheel is")
    wheels = list(parser.parse_args().folder.resolve().glob("*.whl"))
    if len(wheels) != 1:
        sys.exit(f"there must be one wheel, found {len(wheels)}")
    interpreter, name = oldest_python(), "py{}.{}".format(*OLDEST_PYTHON)
    if interpreter is None:
        interpreter, name = sys.executable, "py{}.{}".format(*sys.version_info)
        print(f"== Python {'.'.join(map(str, OLDEST_PYTHON))} is not here: {name} takes its place", flush=True)
    try_wheel(wheels[0], interpreter, name)


if __name__ == "__main__":
    main()
