"""What the README shows has to run."""

import re
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from environments import run


@pytest.fixture(scope="module")
def readme(repository: Path) -> str:
    return (repository / "README.md").read_text()


def test_the_example_runs(readme: str, tmp_path: Path) -> None:
    [example] = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    (tmp_path / "example.py").write_text(example)
    printed = run([sys.executable, "-W", "error", "example.py"], cwd=tmp_path)
    assert "torch.Size([6, 1024])" in printed


def test_the_programs_exist(readme: str) -> None:
    named = set(re.findall(r"tutel\.(?:examples|launcher)\.\w+", readme))
    [table] = re.findall(r"\| program \|.*?\n\n", readme, re.DOTALL)
    named |= {f"tutel.examples.{name}" for name in re.findall(r"(?:^\| |, )`(\w+)`(?=[,| ])", table, re.MULTILINE)}
    assert "tutel.examples.nccl_all_gather_v" in named
    assert [name for name in sorted(named) if find_spec(name) is None] == []


def test_the_targets_that_documents_name_exist(readme: str, repository: Path) -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (repository / "Makefile").read_text(), re.MULTILINE))
    documents = readme + (repository / "CONTRIBUTING.md").read_text() + (repository / "setup.py").read_text()
    assert set(re.findall(r"`make ([a-z0-9-]+)", documents)) <= targets
    assert set(re.findall(r"^make ([a-z0-9-]+)", documents, re.MULTILINE)) <= targets


def test_the_files_that_documents_link_to_exist(repository: Path) -> None:
    for document in ["README.md", "CONTRIBUTING.md", "docs/architecture.md", "docs/checkpoints.md"]:
        path = repository / document
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text()):
            assert (path.parent / link).exists(), f"{document} links to {link}"
