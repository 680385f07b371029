"""Instructions of every kernel on the portable level, counted by callgrind and compared with instructions.txt.

Counts tell of a slower loop where timings are too noisy to, and are equal on all x86-64 machines with AVX2 (whose F16C
converts half types). They depend on the compiler: the file names the release of rustc that it holds for, which is used
here whatever else is installed. Instructions of the C library (copying, allocating) are left out, since it chooses its
own for each processor.
"""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

_ROOT = Path(__file__).parent.parent
_COUNTS = Path(__file__).parent / "instructions.txt"
_HEADER = """\
# Instructions of each kernel's fixed piece of work (crates/tutel-cpu/examples/instructions.rs), x86-64, portable level.
# `make instructions` compares, `make instructions-accept` rewrites. The counts hold for this compiler:
rustc {release}
"""
# One compiler gives equal counts for equal code; but the code of a kernel changes a little with that of its neighbours.
_TOLERANCE = 0.05
_MEASURED = "instructions::measured"


class MissingError(Exception):
    """A tool is not here."""


def read() -> tuple[str, dict[str, int]]:
    """Give the compiler's release and the counts that are recorded."""
    lines = [line for line in _COUNTS.read_text().splitlines() if line and not line.startswith("#")]
    counts = (line.rsplit(maxsplit=1) for line in lines[1:])
    return lines[0].removeprefix("rustc "), {name: int(count) for name, count in counts}


def cargo(release: str) -> list[str]:
    """Give the command of the cargo that goes with a release of rustc."""
    for prefix in ([], ["rustup", "run", release]):
        if not shutil.which((prefix or ["rustc"])[0]):
            continue
        found = subprocess.run([*prefix, "rustc", "--version"], capture_output=True, text=True, check=False, cwd=_ROOT)
        if found.stdout.split()[1:2] == [release]:
            return [*prefix, "cargo"]
    raise MissingError(f"rustc {release} is missing (rustup toolchain install {release} --profile minimal)")


def build(release: str) -> str:
    """Build the program whose instructions are counted, as the wheel's code is built."""
    command = [*cargo(release), "build", "--release", "--package=tutel-cpu", "--example=instructions"]
    # Flags for this one machine would change the counts.
    environment = {name: value for name, value in os.environ.items() if "RUSTFLAGS" not in name}
    built = subprocess.run(
        [*command, "--quiet", "--locked", "--message-format=json-render-diagnostics"],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        cwd=_ROOT,
        env=environment,
    )
    messages = [json.loads(line) for line in built.stdout.splitlines()]
    return next(message["executable"] for message in messages if message.get("executable"))


def own_cost(dump: str, program: str) -> int:
    """Sum the instructions of one object file in a dump of callgrind, those of the functions that it calls left out."""
    total, counted, inclusive = 0, False, False
    for line in dump.splitlines():
        if line.startswith("ob="):
            counted = line[3:] == program
        elif re.match(r"[\d+*-]", line):
            # The line after `calls=` is what a call cost, which stands at the called function too.
            total += int(line.split()[1]) if counted and not inclusive else 0
            inclusive = False
        elif line.startswith("calls="):
            inclusive = True
    return total


def count(program: str) -> dict[str, int]:
    """Run the program under callgrind: one dump for each line that it prints."""
    if not shutil.which("valgrind"):
        raise MissingError("valgrind is missing (apt install valgrind)")
    with tempfile.TemporaryDirectory() as directory:
        dumps = Path(directory) / "dump"
        command = [
            "valgrind",
            "--quiet",
            "--tool=callgrind",
            f"--toggle-collect={_MEASURED}",
            f"--dump-after={_MEASURED}",
            "--compress-strings=no",
            "--compress-pos=no",
            f"--callgrind-out-file={dumps}",
            program,
        ]
        names = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
        costs = [own_cost(Path(f"{dumps}.{i}").read_text(), program) for i in range(1, len(names) + 1)]
    if not names or min(costs) == 0:
        sys.exit(f"callgrind has counted nothing: is {_MEASURED} a function of the program?")
    return dict(zip(names, costs, strict=True))


def compare(recorded: dict[str, int], counts: dict[str, int]) -> int:
    """Print every difference beyond the tolerance; give 1 where something costs more or is not recorded."""
    failed = recorded.keys() != counts.keys()
    for name in dict.fromkeys([*recorded, *counts]):
        before, after = recorded.get(name), counts.get(name)
        if before is None or after is None:
            print(f"  {name}: {before or 'not recorded'} before, {after or 'not counted'} now")
        elif abs(after - before) > _TOLERANCE * before:
            failed |= after > before
            print(f"  {name}: {before} before, {after} now ({after / before - 1:+.1%})")
    if failed:
        print("other counts than recorded; if that is meant: make instructions-accept", file=sys.stderr)
    else:
        print(f"{len(counts)} counts within {_TOLERANCE:.0%} of the recorded ones, or below")
    return int(failed)


def main() -> int:
    """Compare, or rewrite the record."""
    parser = argparse.ArgumentParser(description="count the instructions of the CPU kernels")
    parser.add_argument("--accept", action="store_true", help="write the counts to instructions.txt")
    parser.add_argument("--rustc", metavar="RELEASE", help="the compiler (default: the one that is recorded)")
    options = parser.parse_args()
    release, recorded = read()
    release = options.rustc or release
    try:
        if platform.machine() != "x86_64":
            raise MissingError("the counts are those of x86-64")
        counts = count(build(release))
    except MissingError as missing:
        print(f"instructions are not counted: {missing}", file=sys.stderr)
        return int(os.environ.get("CI") == "true")
    if options.accept:
        lines = (f"{name} {cost}\n" for name, cost in counts.items())
        _COUNTS.write_text(_HEADER.format(release=release) + "".join(lines))
        print(f"{len(counts)} counts written")
        return 0
    return compare(recorded, counts)


if __name__ == "__main__":
    sys.exit(main())
