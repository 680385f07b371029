"""What the wheel holds."""

import re
import struct
import zipfile
from pathlib import Path, PurePosixPath


def needed_libraries(elf: bytes) -> set[str]:
    """Read the names of the libraries that a 64-bit little-endian ELF file asks the loader for."""
    assert elf[:6] == b"\x7fELF\x02\x01"
    (first,) = struct.unpack_from("<Q", elf, 32)
    size, count = struct.unpack_from("<HH", elf, 54)
    headers = [struct.unpack_from("<IIQQQQ", elf, first + index * size) for index in range(count)]
    loaded = [(address, offset, length) for kind, _, offset, address, _, length in headers if kind == 1]
    [(start, length)] = [(offset, length) for kind, _, offset, _, _, length in headers if kind == 2]
    entries = [struct.unpack_from("<qQ", elf, start + at) for at in range(0, length, 16)]
    [strings] = [value for tag, value in entries if tag == 5]
    [strings] = [strings - address + offset for address, offset, size in loaded if address <= strings < address + size]
    names = [strings + value for tag, value in entries if tag == 1]
    return {elf[name : elf.index(b"\0", name)].decode() for name in names}


def test_name_says_one_wheel_for_every_python(wheel: Path) -> None:
    assert re.fullmatch(r"tutel-\d+\.\d+\.\d+-cp310-abi3-(many)?linux\w*\.whl", wheel.name)


def test_content(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert [name for name in names if ".so" in PurePosixPath(name).name] == ["tutel/_core.abi3.so"]
    assert {"tutel/py.typed", "tutel/_core.pyi", "tutel/examples/helloworld.py"} <= set(names)
    folders = {re.sub(r"-.*\.dist-info", ".dist-info", name.split("/")[0]) for name in names}
    assert folders == {"tutel", "tutel.dist-info"}
    assert any(name.endswith("/LICENSE") for name in names)
    assert not [name for name in names if re.search(r"(^|/)tests?/|(^|/)test_", name) or "__pycache__" in name]


def test_every_module_of_the_package_is_there(wheel: Path, repository: Path) -> None:
    source = repository / "python"
    modules = {str(path.relative_to(source)) for path in source.rglob("*.py")}
    assert modules == {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py")}


def test_links_neither_torch_nor_cpp_nor_python(wheel: Path) -> None:
    libraries = needed_libraries(zipfile.ZipFile(wheel).read("tutel/_core.abi3.so"))
    loader = {name for name in libraries if name.startswith("ld-linux")}
    assert libraries - loader <= {"libc.so.6", "libm.so.6", "libgcc_s.so.1", "libdl.so.2", "libpthread.so.0"}


def test_metadata(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    [metadata] = [archive.read(name).decode() for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    header = metadata.partition("\n\n")[0].splitlines()
    assert "Requires-Python: >=3.10" in header
    assert "Requires-Dist: torch>=2.10" in header
    assert "License-Expression: MIT" in header


def test_command_is_there(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    [entries] = [archive.read(name).decode() for name in archive.namelist() if name.endswith("/entry_points.txt")]
    assert re.search(r"^\[console_scripts\]\s+tutel ?= ?tutel\.commands:main$", entries, re.MULTILINE)


def test_names_no_folder_of_the_repository(wheel: Path, repository: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    assert [name for name in archive.namelist() if str(repository).encode() in archive.read(name)] == []
