"""The direction of imports (docs/architecture.md): arrows point down, in Python and between the crates."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, where pytest brings its forerunner
    import tomli as tomllib

#: From the bottom to the top; a room may import from its own layer (without cycles) and from those below.
#: Rooms that are planned stand here already.
LAYERS = [
    {"_core", "_requirements"},
    {"__init__", "errors", "env", "config", "sync"},
    {"functional"},
    {"gates", "route", "losses", "experts"},
    {"distributed"},
    {"dispatcher"},
    {"layer", "tensor_parallel"},
    {"moe", "net", "system", "system_init", "ops", "jit", "impls", "integrations"}
    | {"launcher", "checkpoint", "commands", "__main__", "telemetry", "testing", "examples"},
]
HEIGHT = {room: height for height, layer in enumerate(LAYERS) for room in layer}

#: Where torch.distributed may be used: (room, function); None stands for all of it.
MAY_USE_DISTRIBUTED = {
    ("distributed", None),
    ("checkpoint", None),  # it makes states for torch.distributed.checkpoint
    ("launcher", None),  # it starts torch's own launcher
    ("examples", "data_parallel"),  # DistributedDataParallel wants a group for one process too
}

#: The workspace's crates, and which of them each may depend on.
CRATES = {
    "torch-stable": set[str](),
    "tutel-core": set[str](),
    "tutel-cpu": {"tutel-core"},
    "tutel-moe": {"tutel-core", "tutel-cpu"},
    "tutel-torch": {"tutel-core", "tutel-cpu", "torch-stable"},
}
#: Crates from outside that have one home each.
HOMES = {"libloading": "torch-stable", "pyo3": "tutel-torch"}

MAY_BE_UNSAFE = (
    "crates/torch-stable/src/",
    "crates/tutel-cpu/src/arch/",
    "crates/tutel-cpu/src/disjoint.rs",
    "crates/tutel-cpu/src/owned.rs",
)


@dataclass(frozen=True)
class Source:
    path: Path
    room: str
    tree: ast.Module


@pytest.fixture(scope="module")
def sources(repository: Path) -> list[Source]:
    package = repository / "python" / "tutel"
    found = []
    for path in sorted(package.rglob("*.py")):
        room = path.relative_to(package).parts[0].removesuffix(".py")
        found.append(Source(path, room, ast.parse(path.read_text(), str(path))))
    return found


def modules_imported(tree: ast.AST) -> Iterator[str]:
    """Give every module that is imported anywhere, inside functions too; names after `from` count as modules."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are written in full, from tutel down"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rooms_imported(source: Source) -> set[str]:
    parts = [module.split(".") for module in modules_imported(source.tree)]
    inner = [part[1] if len(part) > 1 else "__init__" for part in parts if part[0] == "tutel"]
    # `from tutel import __version__` and the like: a name of the package itself.
    return {room if room in HEIGHT else "__init__" for room in inner if not room.startswith("__")} - {source.room}


def test_every_room_has_its_place(sources: list[Source]) -> None:
    assert {source.room for source in sources} - set(HEIGHT) == set(), "give it a place in LAYERS and architecture.md"


def test_no_import_runs_upward(sources: list[Source]) -> None:
    upward = [
        f"{source.path.name} ({source.room}) imports {room}"
        for source in sources
        for room in rooms_imported(source)
        if HEIGHT[room] > HEIGHT[source.room]
    ]
    assert upward == []


def test_rooms_do_not_import_each_other_in_a_circle(sources: list[Source]) -> None:
    below: dict[str, set[str]] = {}
    for source in sources:
        below.setdefault(source.room, set()).update(rooms_imported(source))
    while free := [room for room, imported in below.items() if not imported & set(below)]:
        for room in free:
            del below[room]
    assert below == {}


def uses(tree: ast.AST, name: str) -> list[ast.AST]:
    """Give the places that write a dotted name, or import it or something of it."""

    def does(node: ast.AST) -> bool:
        if isinstance(node, ast.Import | ast.ImportFrom):
            imported = modules_imported(ast.Module([node], []))
            return any(f"{module}.".startswith(f"{name}.") for module in imported)
        return isinstance(node, ast.Attribute) and ast.unparse(node) == name

    return [node for node in ast.walk(tree) if does(node)]


def test_only_their_room_talks_to_other_ranks(sources: list[Source]) -> None:
    for source in sources:
        if (source.room, None) in MAY_USE_DISTRIBUTED:
            continue
        functions = [node for node in ast.walk(source.tree) if isinstance(node, ast.FunctionDef)]
        allowed = [
            place
            for function in functions
            if (source.room, function.name) in MAY_USE_DISTRIBUTED
            for place in uses(function, "torch.distributed")
        ]
        others = [place for place in uses(source.tree, "torch.distributed") if place not in allowed]
        assert [f"{source.path.name}: {ast.unparse(place)}" for place in others] == []


@pytest.mark.parametrize("name", ["os.environ", "os.getenv", "os.environb", "os.putenv"])
def test_only_env_reads_the_environment(sources: list[Source], name: str) -> None:
    assert {source.room for source in sources if uses(source.tree, name)} <= {"env"}


def test_functional_has_no_modules(sources: list[Source]) -> None:
    names = ("torch.nn", "nn.Module")
    rooms = {source.room for source in sources for name in names if uses(source.tree, name)}
    assert "functional" not in rooms


def manifests(repository: Path) -> dict[str, set[str]]:
    """Give the crates that each crate of the workspace depends on, for building and testing too."""
    found = {}
    for path in (repository / "crates").glob("*/Cargo.toml"):
        manifest = tomllib.loads(path.read_text())
        tables = [manifest, *manifest.get("target", {}).values()]
        lists = [table.get(f"{kind}dependencies", {}) for table in tables for kind in ("", "build-", "dev-")]
        found[manifest["package"]["name"]] = set().union(*lists)
    return found


def test_crates_depend_downward_only(repository: Path) -> None:
    found = {name: crates & set(CRATES) for name, crates in manifests(repository).items()}
    assert set(found) == set(CRATES)
    assert {name: crates - CRATES[name] for name, crates in found.items() if crates - CRATES[name]} == {}


@pytest.mark.parametrize(("crate", "home"), HOMES.items())
def test_crates_with_one_home(repository: Path, crate: str, home: str) -> None:
    assert {name for name, crates in manifests(repository).items() if crate in crates} <= {home}


def test_unsafe_stands_in_its_places_only(repository: Path) -> None:
    for path in (repository / "crates").glob("*/src/**/*.rs"):
        code = re.sub(r'//.*|"(?:\\.|[^"\\])*"', "", path.read_text())
        if re.search(r"\bunsafe\b", code):
            assert str(path.relative_to(repository)).startswith(MAY_BE_UNSAFE), path
