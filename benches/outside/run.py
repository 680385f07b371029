"""One sparse block in alternating processes, ours and those of peers outside of this environment."""

import argparse
import math
import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benches import report
from benches.floors import Floors, Work
from benches.harness import BRIEF, QUICK, Effort, Sample, Spread, pairwise_ratio, take_turns
from benches.machine import OtherWork, describe
from benches.outside.protocol import Job
from benches.outside.tensors import DTYPES
from benches.outside.workers import Worker, WorkerError
from benches.results import Measured, PeerResult, Result, Run
from benches.workload import difference
from benches.workloads.layer_work import forward_work, without_ties

_RECORDS = Path(__file__).parent.parent / "record"
_WIDTH = 1024
_SETTING = "Each side is a process of its own, warmed, which sleeps while another works"
#: Rounds go through processes that sleep and wake: a sample is longer than in one process.
_EFFORT = Effort(seconds=4.0, least_rounds=5, most_rounds=200, sample_seconds=20e-3)
_QUICK = Effort(seconds=QUICK.seconds, least_rounds=2, most_rounds=20, sample_seconds=BRIEF.sample_seconds)


@dataclass(frozen=True)
class Block:
    """A block's sizes."""

    name: str
    experts: int
    hidden: int
    top_k: int
    tokens: int
    dtype: str

    def __str__(self) -> str:
        return f"outside.forward.{self.dtype}.{self.name}_T{self.tokens}"

    def write(self, folder: Path, threads: int) -> tuple[Job, Work]:
        """Write weights and inputs; return the job and its work, the mean of its inputs."""
        inputs = 1 if self.tokens > 64 else 8
        job = Job(str(folder), self.dtype, self.experts, self.hidden, _WIDTH, self.top_k, self.tokens, inputs, threads)
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> torch.Tensor:
            drawn: torch.Tensor = torch.randn(shape, generator=generator) * shape[-1] ** -0.5
            return drawn.to(DTYPES[self.dtype]).float()

        def write(name: str, numbers: torch.Tensor) -> None:
            job.path(name).write_bytes(numbers.contiguous().numpy().tobytes())

        router = draw(self.experts, _WIDTH)
        count = inputs * self.tokens
        tokens = draw(3 * count + 64, _WIDTH) * _WIDTH**0.5
        # Some sides round the logits to the dtype, some do not.
        logits = (tokens @ router.T).to(DTYPES[self.dtype])
        kept = without_ties(tokens, logits, self.top_k, count)
        write("router", router)
        for name, shape in (
            ("gate", (self.hidden, _WIDTH)),
            ("up", (self.hidden, _WIDTH)),
            ("down", (_WIDTH, self.hidden)),
        ):
            write(name, draw(self.experts, *shape))
        write("inputs", kept)
        ids = (kept @ router.T).topk(self.top_k, dim=1).indices.view(inputs, -1)
        work = forward_work(
            DTYPES[self.dtype],
            tokens=self.tokens,
            top_k=self.top_k,
            width=_WIDTH,
            hidden=self.hidden,
            matrices=3,
            touched=sum(len(each.unique()) for each in ids) / inputs,
        )
        return job, work


def blocks() -> list[Block]:
    """Return every block that is measured."""
    shapes = (("mixtral", 8, 3584, 2), ("qwen3", 128, 384, 8))
    return [Block(*shape, tokens, dtype) for dtype in DTYPES for shape in shapes for tokens in (2048, 8, 1)]


def _calls(worker: Worker, job: Job, effort: Effort) -> int:
    """Return how many calls make a sample that is long enough, in whole turns of the inputs."""
    once = worker.sample(job.inputs, job.inputs).wall
    return job.inputs * max(1, math.ceil(effort.sample_seconds / once / job.inputs))


def _rounds(workers: list[Worker], job: Job, effort: Effort) -> list[list[Sample]]:
    """Let the processes work by turns. They time themselves: what it takes to ask them does not count."""

    def sampler(worker: Worker) -> Callable[[], Sample]:
        calls = _calls(worker, job, effort)
        return lambda: worker.sample(calls, job.inputs)

    return take_turns([sampler(worker) for worker in workers], effort)


class _Session:
    """Measures blocks, and the floors before and after."""

    def __init__(self, python: Path, effort: Effort) -> None:
        self.effort = effort
        self.ours = Worker("tutel", Path(sys.executable), "benches.outside.ours_worker")
        self.peers = [
            Worker("vllm cpu_fused_moe", python, "benches.outside.vllm_worker"),
            Worker("llama.cpp", python, "benches.outside.llama_worker"),
        ]
        self.floors = Floors()
        self.missing: dict[str, str] = {}
        self.failures: dict[str, str] = {}
        self.measured: list[tuple[Measured, Work]] = []

    def measure(self, block: Block) -> Measured:
        """Measure a block."""
        others = OtherWork()
        with tempfile.TemporaryDirectory() as folder:
            job, work = block.write(Path(folder), torch.get_num_threads())
            try:
                self.ours.prepare(job)
                playing = self._prepared(block, job)
                samples = self._timed(block, job, playing)
            finally:
                for worker in (self.ours, *self.peers):
                    worker.stop()
        wall = [Spread.of([sample.wall for sample in each]) for each in samples]
        cpu = min(sample.cpu for sample in samples[0]) / torch.get_num_threads()
        results = [
            PeerResult(peer.name, spread, pairwise_ratio(samples[0], each), len(each))
            for peer, spread, each in zip(playing, wall[1:], samples[1:], strict=True)
        ]
        found = Measured(str(block), wall[0], cpu, len(samples[0]), others.cores(), results)
        self.measured.append((found, work))
        return found

    def _prepared(self, block: Block, job: Job) -> list[Worker]:
        """Make peers ready; return those whose results are ours."""
        reference = self.ours.output(job).to(DTYPES[job.dtype])
        playing = []
        for peer in self.peers:
            try:
                peer.prepare(job)
                reason = difference(reference, peer.output(job).to(DTYPES[job.dtype]))
            except WorkerError as error:
                self.missing[f"{peer.name} in {block}"] = error.reason
                continue
            if reason is None:
                playing.append(peer)
            else:
                self.failures[str(block)] = f"our result differs from that of {peer.name}: {reason}"
        return playing

    def _timed(self, block: Block, job: Job, playing: list[Worker]) -> list[list[Sample]]:
        """Let ours and the peers work by turns; a peer that fails on the way is taken off the list."""
        while True:
            try:
                return _rounds([self.ours, *playing], job, self.effort)
            except WorkerError as error:
                if error.worker is self.ours:
                    raise
                playing.remove(error.worker)
                self.missing[f"{error.worker.name} in {block}"] = error.reason

    def results(self) -> list[Result]:
        """Return the results beside their floors, which must be final."""
        return [
            Result(
                one,
                floor=self.floors.wall.seconds(work),
                cpu_floor=self.floors.cpu.seconds(work),
                cpu_floor_with_fresh=self.floors.cpu.seconds_with_fresh(work),
                bound=self.floors.cpu.bound(work),
                flops=work.flops,
            )
            for one, work in self.measured
        ]

    def rates(self) -> dict[str, dict[str, dict[str, float]]]:
        """Return all rates by clock, subject and who."""
        names = {dtype: name for name, dtype in DTYPES.items()}
        return {
            clock: {**{f"GEMM {names[dtype]}": each for dtype, each in rates.gemm.items()}, "memory": rates.memory}
            for clock, rates in (("wall", self.floors.wall), ("cpu", self.floors.cpu))
        }


def run_all(options: argparse.Namespace) -> int:
    """Run what the options select; return the exit status."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    selected = [block for block in blocks() if re.search(options.filter, str(block))]
    if not selected:
        print(f"no block matches {options.filter!r}; there are: {', '.join(map(str, blocks()))}", file=sys.stderr)
        return 2
    session = _Session(options.peers, _QUICK if options.quick else _EFFORT)
    others = OtherWork()
    dtypes = {DTYPES[block.dtype] for block in selected}
    session.floors.measure(dtypes, session.effort.seconds)
    for block in selected:
        print(f"{block} ...", end=" ", file=sys.stderr, flush=True)
        one = session.measure(block)
        print(", ".join(f"{peer.name} {peer.ratio.median:.2f}" for peer in one.peers), file=sys.stderr)
    session.floors.measure(dtypes, session.effort.seconds)
    run = Run(
        machine=describe(),
        effort=asdict(session.effort),
        other_cores=others.cores(),
        rates=session.rates(),
        results=session.results(),
        failures=session.failures,
        missing=session.missing,
        note=options.note,
    )
    print(report.text(run))
    if options.json:
        options.json.write_text(run.to_json())
    if options.record:
        (_RECORDS / f"{options.record}.md").write_text(
            report.markdown(run, options.record, command="python -m benches.outside", setting=_SETTING)
        )
    return 1 if session.failures else 0
