"""How fast this machine is at the two things that a layer must do: multiply matrices and move memory."""

import mmap
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from tutel.functional import grouped_gemm

from benches.harness import Sample

_GEMM_SIZE = 2048
_BUFFER_BYTES = 256 * 2**20
#: glibc serves allocations from this size on by fresh pages of the system, always.
FRESH_FROM = 32 * 2**20


@dataclass(frozen=True)
class Work:
    """What a workload cannot do without.

    Attributes:
        dtype: What it multiplies in.
        flops: Floating-point operations of its products.
        read: Bytes that are only read, each once.
        moved: Bytes read and bytes written where there is about as much of both, or more written.
        fresh: Bytes of new memory that is written for the first time.
    """

    dtype: torch.dtype
    flops: float = 0
    read: int = 0
    moved: int = 0
    fresh: int = 0


@dataclass(frozen=True)
class Rates:
    """The best rates seen so far in this run. They only rise: noise never makes a machine faster.

    Attributes:
        gemm: FLOP/s of a square product by dtype and by who computes it.
        memory: B/s by kind of access.
    """

    gemm: dict[torch.dtype, dict[str, float]] = field(default_factory=dict)
    memory: dict[str, float] = field(default_factory=dict)

    def seconds(self, work: Work) -> float:
        """Return the least time for the work on warm memory: the larger of multiplying and moving."""
        return max(self._multiplying(work), self._moving(work))

    def seconds_with_fresh(self, work: Work) -> float:
        """Return the same with the first touch of fresh pages, done the cheapest way that was measured."""
        touch = max(self.memory["first touch"], self.memory.get("first touch, huge pages", 0.0))
        warm = max(self._multiplying(work), self._moving(work) - work.fresh / self.memory["copy"])
        return max(self.seconds(work), warm + work.fresh / touch)

    def bound(self, work: Work) -> str:
        """Tell which of the two it is."""
        return "GEMM" if self._multiplying(work) >= self._moving(work) else "memory"

    def _multiplying(self, work: Work) -> float:
        return work.flops / max(self.gemm[work.dtype].values()) if work.flops else 0.0

    def _moving(self, work: Work) -> float:
        return work.read / self.memory["read"] + work.moved / self.memory["copy"]


@dataclass(frozen=True)
class Floors:
    """What the machine can do, by the clock and by processor time.

    On a busy machine the clock tells what others left over. Processor time, divided by the number of threads, tells
    what the threads would need if nobody took their cores away (and if all of them worked all the time).
    """

    wall: Rates = field(default_factory=Rates)
    cpu: Rates = field(default_factory=Rates)

    def measure(self, dtypes: set[torch.dtype], seconds: float) -> None:
        """Measure again for about so many seconds."""
        share = seconds / (len(dtypes) + 1)
        for dtype in sorted(dtypes, key=str):
            times = _time_gemm(dtype, share)
            for rates, threads in self._clocks():
                _keep_best(rates.gemm.setdefault(dtype, {}), times, 2 * _GEMM_SIZE**3, threads)
        times = _time_memory(share)
        for rates, threads in self._clocks():
            _keep_best(rates.memory, times, _BUFFER_BYTES, threads)

    def _clocks(self) -> list[tuple[Rates, int | None]]:
        """Return the rates of each clock, with the threads that share processor time."""
        return [(self.wall, None), (self.cpu, torch.get_num_threads())]


def _keep_best(seen: dict[str, float], times: dict[str, Sample], work: float, threads: int | None) -> None:
    for name, sample in times.items():
        seconds = sample.wall if threads is None else sample.cpu / threads
        seen[name] = max(work / seconds, seen.get(name, 0.0))


def _best(run: Callable[[], object], seconds: float) -> Sample:
    """Return the least times of a call."""
    run()
    samples: list[Sample] = []
    end = time.perf_counter() + seconds
    while not samples or time.perf_counter() < end:
        samples.append(Sample.take(run))
    return Sample(min(sample.wall for sample in samples), min(sample.cpu for sample in samples))


def _time_gemm(dtype: torch.dtype, seconds: float) -> dict[str, Sample]:
    size = _GEMM_SIZE
    left, right = (torch.randn(size, size).to(dtype) for _ in range(2))
    offsets = torch.tensor([0, size])
    sides: dict[str, Callable[[], object]] = {
        "torch.mm": lambda: torch.mm(left, right),
        "tutel grouped_gemm": lambda: grouped_gemm(left, right[None], offsets),
    }
    if dtype == torch.float32 and torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        # On some processors torch.mm takes a library that does not know all of their instructions, and oneDNN does.
        linear = torch.ops.mkldnn._linear_pointwise
        sides["oneDNN linear"] = lambda: linear(left, right, None, "none", [], "")
    if dtype == torch.float16:
        # Without fp16 instructions torch multiplies one by one: 20 s for this product, and no floor.
        del sides["torch.mm"]
    return {name: _best(run, seconds / len(sides)) for name, run in sides.items()}


def _time_memory(seconds: float) -> dict[str, Sample]:
    """Time accesses to as many bytes as the buffer has, reads and writes both counted."""
    count = _BUFFER_BYTES // 4
    source, target = torch.ones(count), torch.ones(count)
    half = count // 2
    share = seconds / 4
    times = {
        "copy": _best(lambda: target[:half].copy_(source[:half]), share),
        "read": _best(source.sum, share),
        "first touch": _best(lambda: torch.empty(count).fill_(1.0), share),
    }
    if hasattr(mmap, "MADV_HUGEPAGE"):
        times["first touch, huge pages"] = _best(_touch_huge_pages, share)
    return times


def _touch_huge_pages() -> None:
    # Python maps shared memory if not told otherwise, and that is never given huge pages on advice.
    pages = mmap.mmap(-1, _BUFFER_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_HUGEPAGE)
    torch.frombuffer(pages, dtype=torch.float32).fill_(1.0)
