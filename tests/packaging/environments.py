"""Commands, and virtual environments that borrow this one's packages."""

import os
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def run(
    command: Sequence[str | Path], *, cwd: Path | None = None, env: dict[str, str] | None = None, status: int = 0
) -> str:
    """Run a command to its end; return what it printed, or fail with it."""
    __tracebackhide__ = True  # a failure shows the command and its output, not the environment
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == status, f"{command} ended with {done.returncode}:\n{done.stdout}"
    return done.stdout


@dataclass(frozen=True)
class Environment:
    """A virtual environment in which everything this one has is installed, except tutel."""

    folder: Path
    variables: dict[str, str] = field(repr=False)

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python3"

    def run(self, *command: str | Path, cwd: Path, status: int = 0) -> str:
        __tracebackhide__ = True
        # "python3" is this environment's, as in a user's activated one.
        return run(command, cwd=cwd, env=self.variables, status=status)

    def where_tutel_is(self, cwd: Path) -> Path:
        return Path(self.run("python3", "-c", "import tutel; print(tutel.__file__)", cwd=cwd).strip())


def make_environment(folder: Path, *, with_user_site: bool) -> Environment:
    venv = folder / "venv"
    extra = ["--system-site-packages"] if with_user_site else []
    run([sys.executable, "-m", "venv", "--without-pip", *extra, venv])
    borrowed = folder / "borrowed"
    borrowed.mkdir()
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if not entry.name.startswith("tutel") and entry.suffix != ".pth":
            (borrowed / entry.name).symlink_to(entry)
    [site_packages] = venv.glob("lib/python3*/site-packages")
    (site_packages / "borrowed.pth").write_text(f"{borrowed}\n")

    variables = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PIP_", "PYENV"))}
    variables["PATH"] = f"{venv / 'bin'}{os.pathsep}{os.environ['PATH']}"
    variables["VIRTUAL_ENV"] = str(venv)
    variables["PYTHONUSERBASE"] = str(folder / "user")
    variables["PIP_DISABLE_PIP_VERSION_CHECK"] = "1"
    variables["PIP_ROOT_USER_ACTION"] = "ignore"
    # Crates from other registries are compiled once for all tests, apart from the builds of developers.
    variables["CARGO_TARGET_DIR"] = str(REPOSITORY / "target" / "packaging")
    # Each clone's own crates are compiled anew: without what makes kernels fast, of which these tests see nothing.
    variables |= {"CARGO_PROFILE_RELEASE_OPT_LEVEL": "0", "CARGO_PROFILE_RELEASE_LTO": "off"}
    variables["CARGO_PROFILE_RELEASE_CODEGEN_UNITS"] = "16"
    return Environment(venv, variables)
