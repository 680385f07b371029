"""Every way to install and start that the README promises, typed as a user types it."""

import sys
from pathlib import Path

import pytest
from environments import Environment, run

# They build in one folder, where cargo lets one build go on at a time.
pytestmark = pytest.mark.slow

TINY = ["--batch_size=1", "--num_tokens=8", "--model_dim=8", "--hidden_size=8", "--num_steps=2", "--device=cpu"]


def check_example(printed: str) -> None:
    lines = printed.splitlines()
    assert [line.split()[0] for line in lines if line] == [
        "[Statistics]",
        "[Benchmark]",
        "STEP-0:",
        "STEP-1:",
        "[Summary]",
    ]


def test_pip_install_the_clone_and_start_the_example_in_both_ways(environment: Environment, clone: Path) -> None:
    environment.run("python3", "-m", "pip", "install", ".", cwd=clone)
    assert environment.folder in environment.where_tutel_is(clone).parents
    # In the clone, where a folder `tutel` stands beside: the installed package has to win.
    check_example(environment.run("python3", "-m", "tutel.examples.helloworld", *TINY, cwd=clone))
    check_example(environment.run("python3", "./tutel/examples/helloworld.py", *TINY, cwd=clone))


def test_pip_install_from_git(environment: Environment, clone: Path, tmp_path: Path) -> None:
    environment.run("python3", "-m", "pip", "install", f"git+file://{clone}", cwd=tmp_path)
    assert environment.folder in environment.where_tutel_is(tmp_path).parents
    check_example(environment.run("python3", "-m", "tutel.examples.helloworld", *TINY, cwd=tmp_path))


def test_pip_install_the_source_distribution(environment: Environment, clone: Path, tmp_path: Path) -> None:
    run([sys.executable, "-m", "maturin", "sdist", "--out", tmp_path / "dist"], cwd=clone)
    [archive] = (tmp_path / "dist").glob("tutel-*.tar.gz")
    environment.run("python3", "-m", "pip", "install", archive, cwd=tmp_path)
    assert environment.folder in environment.where_tutel_is(tmp_path).parents


def test_setup_py_install(environment: Environment, clone: Path) -> None:
    environment.run("python3", "setup.py", "install", cwd=clone)
    assert environment.folder in environment.where_tutel_is(clone).parents


def test_setup_py_install_for_the_user_from_outside(
    environment_with_user_site: Environment, clone: Path, tmp_path: Path
) -> None:
    environment = environment_with_user_site
    environment.run("python3", f"./{clone.name}/setup.py", "install", "--user", cwd=clone.parent)
    assert Path(environment.variables["PYTHONUSERBASE"]) in environment.where_tutel_is(tmp_path).parents


@pytest.mark.parametrize("command", [["develop"], ["build"], ["bdist_wheel"], []])
def test_setup_py_says_what_to_do_instead(environment: Environment, clone: Path, command: list[str]) -> None:
    printed = environment.run("python3", "setup.py", *command, cwd=clone, status=1)
    given = command[0] if command else "nothing"
    assert printed == (
        f"setup.py knows `install [--user]` only, got {given}: use `make develop` for an editable build, "
        "`make wheel` for a wheel, or `pip install .`\n"
    )
