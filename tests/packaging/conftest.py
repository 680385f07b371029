"""What the packaging tests share: the wheel, a clone, and fresh environments."""

import shutil
import sys
from pathlib import Path

import pytest
from environments import REPOSITORY, Environment, make_environment, run


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that `make wheel` has built, or else one built now."""
    folder = REPOSITORY / "dist"
    if not list(folder.glob("*.whl")):
        folder = tmp_path_factory.mktemp("dist")
        run([sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", folder, REPOSITORY])
    [wheel] = folder.glob("*.whl")
    return wheel


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    return make_environment(tmp_path, with_user_site=False)


@pytest.fixture
def environment_with_user_site(tmp_path: Path) -> Environment:
    """Also allows `--user`, which pip refuses in an environment that doesn't see the system's packages."""
    return make_environment(tmp_path, with_user_site=True)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A copy of the repository as git would hand it out, with changes that are not committed yet, as one commit."""
    target = tmp_path / "clone"
    target.mkdir()
    listed = run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=REPOSITORY)
    for name in filter(None, listed.split("\0")):
        source = REPOSITORY / name
        if source.is_symlink() or source.exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target / name, follow_symlinks=False)
    author = ["-c", "user.name=tests", "-c", "user.email=tests@localhost"]
    run(["git", "init", "--quiet"], cwd=target)
    run(["git", "add", "--all"], cwd=target)
    run(["git", *author, "commit", "--quiet", "--message", "the working tree"], cwd=target)
    return target
