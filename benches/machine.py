"""What the measurements ran on, and how much of it others used meanwhile."""

import datetime
import os
import platform
import subprocess
import time
from pathlib import Path

import torch

import tutel
from tutel import _core

#: The features that decide which kernels run.
_FLAGS = [
    "f16c",
    "fma",
    "avx2",
    "avx512f",
    "avx512bw",
    "avx512_bf16",
    "avx512_fp16",
    "amx_bf16",
    "asimd",
    "sve",
    "bf16",
]
_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


def _cpu_fields() -> dict[str, str]:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    # The first processor's fields win: dict() keeps the last of equal keys.
    pairs = [line.split(":", 1) for line in reversed(lines) if ":" in line]
    return {key.strip(): value.strip() for key, value in pairs}


def _commit() -> str:
    root = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _built() -> str:
    """Tell when the native module was built: the commit alone does not say what was measured."""
    built = Path(str(_core.__file__)).stat().st_mtime
    return datetime.datetime.fromtimestamp(built, datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def describe() -> dict[str, str]:
    """Describe the machine and the software, each fact as a short text."""
    cpu = _cpu_fields()
    flags = (cpu.get("flags") or cpu.get("Features") or "").split()
    family = f" (family {cpu['cpu family']}, model {cpu['model']})" if "cpu family" in cpu and "model" in cpu else ""
    settings = {name: value for name, value in os.environ.items() if name.startswith(("OMP_", "TUTEL_", "MKL_"))}
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "cpu": cpu.get("model name", platform.processor() or platform.machine()) + family,
        "cores": str(os.cpu_count()),
        "flags": " ".join(flag for flag in _FLAGS if flag in flags),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
        "tutel": f"{tutel.__version__}, commit {_commit()}, native module of {_built()}",
        "environment": " ".join(f"{name}={value}" for name, value in sorted(settings.items())),
    }


class OtherWork:
    """How many cores other processes kept busy since this was made."""

    def __init__(self) -> None:
        self._start = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float]:
        """Return (wall seconds, busy core seconds of the machine, core seconds of this process and ended children)."""
        own = os.times()
        path = Path("/proc/stat")
        ticks = [int(field) for field in path.read_text().split("\n", 1)[0].split()[1:]] if path.exists() else []
        # user nice system idle iowait irq softirq steal guest ...: guest is contained in user.
        busy = sum(ticks[:8]) - sum(ticks[3:5]) if ticks else 0
        return time.monotonic(), busy / _TICKS_PER_SECOND, sum(own[:4])

    def cores(self) -> float:
        """Return the mean number of cores that others used; 0 where the system does not tell."""
        wall, busy, own = (now - start for now, start in zip(self._now(), self._start, strict=True))
        return max(0.0, busy - own) / wall if wall > 0 else 0.0
