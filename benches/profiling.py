"""Where processor time goes, by perf; ``python -m benches.profiling WORKLOAD SECONDS`` is what it looks at."""

import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benches.results import Profile

_ROOT = Path(__file__).parent.parent
_SECONDS = 4.0
_FUNCTIONS = 20
_LONGEST_NAME = 100
#: What is profiled where nothing else is asked for: helloworld's two settings and two blocks of Hugging Face.
NAMES = [
    "layer.train.fp32.E2_k2_T1024_D2048_H2048",
    "layer.train.fp32.E64_k2_T1024_D2048_H512",
    "hf.forward.fp32.mixtral_T2048",
    "hf.forward.fp32.qwen3_T2048",
    "hf.train.fp32.mixtral_T2048",
    "hf.train.fp32.qwen3_T2048",
]


def _shortened(symbol: str) -> str:
    """Return what tells a function from others: of torch's loops, whose names run to lines, the kernel's own name."""
    if len(symbol) <= _LONGEST_NAME:
        return symbol
    kernel = re.search(r"\w+_kernel\w*", symbol)
    return f"{kernel[0]} (a loop of torch)" if kernel else symbol[: _LONGEST_NAME - 1] + "…"


def parse(report: str) -> list[tuple[float, str, str]]:
    """Return (share, library, function) from a report of perf: overhead, dso, symbol and more, separated by ``|``.

    Addresses without names are added up: they are one unknown each library.
    """
    found: dict[tuple[str, str], float] = {}
    for line in report.splitlines():
        fields = [field.strip() for field in line.split("|")]
        if len(fields) < 3 or not fields[0].endswith("%"):
            continue
        library = Path(fields[1]).name
        symbol = re.sub(r"^\[[^]]\] *", "", fields[2])
        # Rust's names end in a hash.
        symbol = _shortened(re.sub(r"::h[0-9a-f]{16}$", "", symbol))
        if re.fullmatch(r"(0x)?[0-9a-f]+", symbol):
            symbol = "(no symbols)"
        key = (library, symbol)
        found[key] = found.get(key, 0.0) + float(fields[0].rstrip("%")) / 100
    ordered = sorted(((share, *key) for key, share in found.items()), reverse=True)
    return ordered[:_FUNCTIONS]


def _profile(name: str, folder: Path) -> Profile:
    """Attach to a process that repeats the workload, so that its start is not in the picture."""
    child = subprocess.Popen(
        [sys.executable, "-m", "benches.profiling", name, str(_SECONDS + 2)],
        cwd=_ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    data = folder / "perf.data"
    try:
        assert child.stdout is not None
        if child.stdout.readline().strip() != "ready":
            raise RuntimeError(f"{name} did not start")
        record = ["perf", "record", "--quiet", "-e", "cpu-clock", "-p", str(child.pid), "-o", str(data)]
        done = subprocess.run([*record, "--", "sleep", str(_SECONDS)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"perf record: {done.stderr.strip()}")
    finally:
        child.terminate()
        child.wait()
    command = ["perf", "report", "--stdio", "-i", str(data), "--sort", "dso,symbol", "--field-separator", "|"]
    shown = subprocess.run(command, capture_output=True, text=True)
    if shown.returncode:
        raise RuntimeError(f"perf report: {shown.stderr.strip()}")
    return Profile(name, parse(shown.stdout))


def measure_all(pattern: str, missing: dict[str, str]) -> list[Profile]:
    """Profile those workloads whose names match; say in ``missing`` why it cannot be done."""
    if shutil.which("perf") is None:
        missing["profiles"] = "perf is not installed"
        return []
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for name in NAMES:
            if not re.search(pattern, name):
                continue
            print(f"profile of {name} ...", file=sys.stderr, flush=True)
            try:
                found.append(_profile(name, Path(folder)))
            except RuntimeError as error:
                missing[f"profile of {name}"] = str(error)
    return found


def repeat(name: str, seconds: float) -> None:
    """Repeat our side of a workload, and say when it is warm."""
    from benches.workloads import ALL

    case = next(workload for workload in ALL if workload.name == name).build()
    run = case.ours.run
    run()
    print("ready", flush=True)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        run()


if __name__ == "__main__":
    repeat(sys.argv[1], float(sys.argv[2]))
