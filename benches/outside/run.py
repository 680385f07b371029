"""One sparse block in alternating processes, ours and those of peers outside of this environment."""

import argparse
import math
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benches import report
from benches.floors import Floors
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

    def write(self, folder: Path, threads: int) -> tuple[Job, float]:
        """Write weights and inputs; return the job and the mean number of experts that an input touches."""
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
        return job, sum(len(each.unique()) for each in ids) / inputs


def blocks() -> list[Block]:
    """Return every block that is measured."""
    shapes = (("mixtral", 8, 3584, 2), ("qwen3", 128, 384, 8))
    return [Block(*shape, tokens, dtype) for dtype in DTYPES for shape in shapes for tokens in (2048, 8, 1)]


def _workers(peers: Path) -> tuple[Worker, list[Worker]]:
    ours = Worker("tutel", Path(sys.executable), "benches.outside.ours_worker")
    others = [("vllm cpu_fused_moe", "vllm_worker"), ("llama.cpp", "llama_worker")]
    return ours, [Worker(name, peers, f"benches.outside.{module}") for name, module in others]


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


def _prepared(peers: list[Worker], job: Job, reference: torch.Tensor) -> Iterator[tuple[Worker, str | None]]:
    """Make peers ready and compare them; yield each with the reason why it cannot take part."""
    for peer in peers:
        try:
            peer.prepare(job)
            reason = difference(reference.to(DTYPES[job.dtype]), peer.output(job).to(DTYPES[job.dtype]))
            yield peer, reason and f"its result differs from ours: {reason}"
        except WorkerError as error:
            yield peer, str(error)


def _measure(block: Block, peers_python: Path, effort: Effort, missing: dict[str, str]) -> tuple[Measured, float]:
    """Measure a block; return the experts touched with it."""
    ours, peers = _workers(peers_python)
    with tempfile.TemporaryDirectory() as folder:
        job, touched = block.write(Path(folder), torch.get_num_threads())
        try:
            ours.prepare(job)
            playing = []
            for peer, reason in _prepared(peers, job, ours.output(job)):
                if reason is None:
                    playing.append(peer)
                else:
                    missing[f"{peer.name} in {block}"] = reason
            others = OtherWork()
            samples = _rounds([ours, *playing], job, effort)
        finally:
            for worker in (ours, *peers):
                worker.stop()
    wall = [Spread.of([sample.wall for sample in each]) for each in samples]
    cpu = min(sample.cpu for sample in samples[0]) / torch.get_num_threads()
    results = [
        PeerResult(peer.name, spread, pairwise_ratio(samples[0], each), len(each))
        for peer, spread, each in zip(playing, wall[1:], samples[1:], strict=True)
    ]
    # The workers' own work counts as others' here: nothing tells them apart.
    cores = max(0.0, others.cores() - torch.get_num_threads())
    return Measured(str(block), wall[0], cpu, len(samples[0]), cores, results), touched


def run_all(options: argparse.Namespace) -> int:
    """Run what the options select; return the exit status."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    effort = _QUICK if options.quick else _EFFORT
    selected = [block for block in blocks() if re.search(options.filter, str(block))]
    floors = Floors()
    missing: dict[str, str] = {}
    measured = []
    for dtype in sorted({block.dtype for block in selected}):
        floors.measure({DTYPES[dtype]}, effort.seconds)
    for block in selected:
        print(f"{block} ...", end=" ", file=sys.stderr, flush=True)
        one, touched = _measure(block, options.peers, effort, missing)
        work = forward_work(
            DTYPES[block.dtype],
            tokens=block.tokens,
            top_k=block.top_k,
            width=_WIDTH,
            hidden=block.hidden,
            matrices=3,
            touched=touched,
        )
        measured.append((one, work))
        print(", ".join(f"{peer.name} {peer.ratio.median:.2f}" for peer in one.peers), file=sys.stderr)
    floors.measure({DTYPES[block.dtype] for block in selected}, effort.seconds)
    results = [
        Result(
            one,
            floor=floors.wall.seconds(work),
            cpu_floor=floors.cpu.seconds(work),
            cpu_floor_with_fresh=floors.cpu.seconds_with_fresh(work),
            bound=floors.cpu.bound(work),
            flops=work.flops,
        )
        for one, work in measured
    ]
    rates = {"wall": floors.wall, "cpu": floors.cpu}
    run = Run(
        machine=describe(),
        effort=asdict(effort),
        other_cores=0.0,
        rates={
            clock: {
                **{f"GEMM {name}": each.gemm[dtype] for name, dtype in DTYPES.items() if dtype in each.gemm},
                "memory": each.memory,
            }
            for clock, each in rates.items()
        },
        results=results,
        failures={},
        missing=missing,
        note=options.note,
    )
    print(report.text(run))
    if options.json:
        options.json.write_text(run.to_json())
    if options.record:
        (_RECORDS / f"{options.record}.md").write_text(report.markdown(run, options.record))
    return 0
