"""The public names are frozen in public_names.txt, where a change is seen; `make freeze` rewrites the file."""

import difflib
import importlib
import inspect
import re
from pathlib import Path

import torch

FROZEN = Path(__file__).with_name("public_names.txt")
MODULES = ["tutel", "tutel.moe", "tutel.net", "tutel.system", "tutel.distributed", "tutel.functional"]


def arguments(function: object) -> str:
    """Write a signature without annotations, which Python versions print in different ways, and without addresses."""
    assert callable(function)
    parameters = inspect.signature(function).parameters.values()
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in parameters]
    return re.sub(r"<function (\w+) at 0x[0-9a-f]+>", r"\1", str(inspect.Signature(bare)))


def describe(module: str, name: str) -> list[str]:
    value = getattr(importlib.import_module(module), name)
    path = f"{module}.{name}"
    if not inspect.isclass(value):
        return [path + arguments(value) if callable(value) else path]
    if hasattr(value, "_fields"):
        return [f"{path}: {', '.join(value._fields)}"]
    own = set(dir(value)) - set(dir(torch.nn.Module)) - set(dir(RuntimeError))
    methods = ["__init__", *sorted(method for method in {"forward", *own} if not method.startswith("_"))]
    return [path, *(f"{path}.{method}{member(value, method)}" for method in methods if hasattr(value, method))]


def member(owner: type, name: str) -> str:
    value = getattr(owner, name)
    return arguments(value) if callable(value) else ""


def operators() -> list[str]:
    names = torch._C._dispatch_get_all_op_names()
    ours = sorted(name.removeprefix("tutel::") for name in names if name.startswith("tutel::"))
    return [str(getattr(torch.ops.tutel, name).default._schema) for name in ours]


def public_names() -> str:
    lines = []
    for module in MODULES:
        for name in sorted(importlib.import_module(module).__all__):
            lines += describe(module, name)
    return "\n".join(lines + operators()) + "\n"


def test_public_names_are_the_frozen_ones() -> None:
    changes = "\n".join(
        difflib.unified_diff(FROZEN.read_text().splitlines(), public_names().splitlines(), "frozen", "now", lineterm="")
    )
    assert not changes, f"public names have changed; if that is meant, run `make freeze` and commit:\n{changes}"


if __name__ == "__main__":
    FROZEN.write_text(public_names())
