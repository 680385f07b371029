"""Files of states: PyTorch's and safetensors, told by their names, read key by key and written whole or not at all."""

import importlib
import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tutel.checkpoint.errors import CheckpointError, names

SAFETENSORS = ".safetensors"


class SafetensorsState(Mapping[str, Any]):
    """The tensors of a safetensors file, read when they are asked for."""

    def __init__(self, path: Path) -> None:
        self._file = _safetensors(path).safe_open(path, framework="pt")
        self._keys = dict.fromkeys(self._file.keys())

    def __getitem__(self, key: str) -> Tensor:
        if key not in self._keys:
            raise KeyError(key)
        tensor: Tensor = self._file.get_tensor(key)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def read(path: Path, *, check: bool = True) -> Mapping[str, Any]:
    """Read a file; tensors come to memory as they are used.

    Args:
        path: A safetensors file if its name ends so, PyTorch's otherwise. Of the latter only weights are read.
        check: Compare the checksums of PyTorch's file, which reads all of it once. (The other kind has none.)

    Raises:
        ImportError: If it is a safetensors file and the package is not installed.
        CheckpointError: If it is missing, damaged, or holds something else.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist" if not path.exists() else f"{path} is no file")
    try:
        state = SafetensorsState(path) if path.suffix == SAFETENSORS else _read_torch(path, check)
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # readers of both kinds raise whatever damaged bytes lead them to
        raise CheckpointError(f"{path} is damaged, or no such file: {_first_line(error)}") from error
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{path} must hold a state dict, got {type(state).__name__}")
    return state


def steps(path: Path, namespace: str) -> list[str]:
    """Return the entries that lead to a file's state, from the outermost; safetensors files have none."""
    return [] if path.suffix == SAFETENSORS else [name for name in namespace.split("/") if name]


def entry(root: Mapping[str, Any], steps: Sequence[str], title: str) -> Mapping[str, Any]:
    """Return the state inside a file's entry, or inside an entry of that, and so on.

    Raises:
        CheckpointError: If there is no such entry, or no state in it.
    """
    found: Any = root
    for name in steps:
        if not isinstance(found, Mapping) or name not in found:
            there = names([str(key) for key in found]) if isinstance(found, Mapping) else type(found).__name__
            raise CheckpointError(f"{title} has no entry {name!r} of namespace {'/'.join(steps)!r}, but {there}")
        found = found[name]
    if not isinstance(found, Mapping) or not all(isinstance(key, str) for key in found):
        where = f" under namespace {'/'.join(steps)!r}" if steps else ""
        raise CheckpointError(f"{title} must hold a state dict{where}")
    return found


def with_entry(root: Mapping[str, Any], steps: Sequence[str], state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a file's content with another state in an entry."""
    return {**root, steps[0]: with_entry(root.get(steps[0], {}), steps[1:], state)} if steps else dict(state)


class Outputs:
    """Files that appear together, when all of them are on the disk, or not at all.

    As a context: what was added is there afterwards under its name, unless an exception leaves it.
    """

    def __init__(self) -> None:
        self._unfinished: dict[Path, Path] = {}

    def __enter__(self) -> "Outputs":
        return self

    def add(self, path: Path, content: Mapping[str, Any]) -> None:
        """Write a file under a name for the time being.

        Raises:
            ImportError: If it is a safetensors file and the package is not installed.
            CheckpointError: If it is a safetensors file and not all values are tensors.
            OSError: If it cannot be written.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
        self._unfinished[path] = unfinished
        if path.suffix == SAFETENSORS:
            module = _safetensors(path)
            module.torch.save_file(_tensors(content, path), unfinished, {"format": "pt"})
        else:
            torch.save(compact(content), unfinished)
        _to_disk(unfinished)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Give the files their names, or remove them."""
        if kind is not None:
            for unfinished in self._unfinished.values():
                unfinished.unlink(missing_ok=True)
            return
        for path, unfinished in self._unfinished.items():
            unfinished.replace(path)
        for folder in {path.parent for path in self._unfinished}:
            _to_disk(folder)


def compact(value: Any) -> Any:
    """Return a copy of nested values in which no tensor is a part of larger memory: a file would hold all of that."""
    if isinstance(value, Tensor):
        value = value.detach()
        return (
            value
            if value.untyped_storage().nbytes() == value.nbytes
            else value.clone(memory_format=torch.contiguous_format)
        )
    if isinstance(value, Mapping):
        return {key: compact(inner) for key, inner in value.items()}
    return value


def _read_torch(path: Path, check: bool) -> Any:
    zipped = zipfile.is_zipfile(path)
    if zipped and check:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
    # Files of versions before 1.6 are no archives and cannot be mapped.
    return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)


def _safetensors(path: Path) -> Any:
    try:
        # By its name: it is no dependency, and need not be there where types are checked.
        importlib.import_module("safetensors.torch")
        return importlib.import_module("safetensors")
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("safetensors"):
            raise
        raise ImportError(f"{path} needs the package safetensors (pip install 'tutel[safetensors]')") from None


def _tensors(content: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    tensors, others = {}, []
    for key, value in content.items():
        if isinstance(value, Tensor):
            tensors[key] = value.detach().cpu().contiguous()
        elif isinstance(value, int | float):
            tensors[key] = torch.tensor(value)
        else:
            others.append(f"{key} ({type(value).__name__})")
    if others:
        raise CheckpointError(f"{path} can hold tensors only, not {names(others)}")
    # It refuses tensors that share memory, as tied weights do: all but the first become copies.
    seen: set[int] = set()
    for key, tensor in tensors.items():
        address = tensor.untyped_storage().data_ptr()
        if tensor.numel() and address in seen:
            tensors[key] = tensor.clone()
        seen.add(address)
    return tensors


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
