"""The run: floors and workloads by turns, then what is measured in processes of their own, then the reports."""

import argparse
import gc
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch

from benches import memory, profiling, report
from benches.floors import Floors, Work
from benches.harness import BRIEF, FULL, QUICK, Effort, Spread, alternate, pairwise_ratio
from benches.machine import OtherWork, describe
from benches.results import Measured, PeerResult, Result, Run
from benches.workload import SHORT_NAMES, DisagreementError, MissingPeerError, Workload, check_agreement
from benches.workloads import ALL, MISSING

_RECORDS = Path(__file__).parent / "record"
#: Seconds for all inputs in turn from which on a peer is called once.
_SLOW = 4.0


def _selected(pattern: str) -> list[Workload]:
    return [workload for workload in ALL if re.search(pattern, workload.name)]


def list_names(pattern: str) -> list[str]:
    """Return the names of the workloads that match."""
    return [workload.name for workload in _selected(pattern)]


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


def _measure(workload: Workload, effort: Effort) -> tuple[Measured, Work]:
    torch.manual_seed(0)
    case = workload.build()
    taken = check_agreement(case)
    # Nothing is learned from the third minute of a peer that is ten times slower: its one call has to do.
    slow = {name for name, sample in taken.items() if sample.wall * case.turns > _SLOW}
    playing = [case.ours, *(peer for peer in case.peers if peer.name not in slow)]
    others = OtherWork()
    timed = alternate([side.run for side in playing], effort, case.turns)
    samples = dict(zip((side.name for side in playing), timed, strict=True))
    samples |= {name: [taken[name]] for name in slow}
    ours = samples[case.ours.name]
    peers = [
        PeerResult(
            peer.name,
            Spread.of([sample.wall for sample in samples[peer.name]]),
            pairwise_ratio(ours, samples[peer.name]),
            len(samples[peer.name]),
        )
        for peer in case.peers
    ]
    wall = Spread.of([sample.wall for sample in ours])
    cpu = min(sample.cpu for sample in ours) / torch.get_num_threads()
    return Measured(workload.name, wall, cpu, len(ours), others.cores(), peers, workload.point), case.work


class _Session:
    """Measures workloads, and the floors of each number of threads that they run with."""

    def __init__(self, workloads: list[Workload], quick: bool) -> None:
        self.workloads = workloads
        self.full, self.brief = (QUICK, QUICK) if quick else (FULL, BRIEF)
        self.floors: dict[int, Floors] = {}
        self.failures: dict[str, str] = {}
        self.missing = dict(MISSING)
        self.measured: list[tuple[Workload, Measured, Work]] = []

    @staticmethod
    def threads_of(workload: Workload) -> int:
        """Return the threads a workload runs with."""
        return workload.threads or torch.get_num_threads()

    def measure_floors(self, workloads: list[Workload]) -> None:
        """Measure the floors that these workloads need again: they only become better."""
        for threads in sorted({self.threads_of(workload) for workload in workloads}):
            dtypes = {workload.dtype for workload in workloads if self.threads_of(workload) == threads}
            with _threads(threads):
                self.floors.setdefault(threads, Floors()).measure(dtypes, self.full.seconds)

    def measure_all(self) -> None:
        """Measure; workloads whose sides do not agree go to ``failures`` instead.

        Floors are measured anew before each subject, so that one busy moment does not lower them.
        """
        subject = ""
        for workload in self.workloads:
            if workload.subject != subject:
                subject = workload.subject
                self.measure_floors([other for other in self.workloads if other.subject == subject])
            print(f"{workload.name} ...", end=" ", file=sys.stderr, flush=True)
            start = time.perf_counter()
            try:
                with _threads(self.threads_of(workload)):
                    measured, work = _measure(workload, self.brief if workload.brief else self.full)
            except DisagreementError as error:
                # The other workloads' results stay good, and may have taken long.
                self.failures[workload.name] = str(error)
                print(f"the sides do not agree: {error}", file=sys.stderr)
                continue
            except MissingPeerError as error:
                self.missing[error.peer] = error.reason
                print(f"not run: {error}", file=sys.stderr)
                continue
            finally:
                gc.collect()
            self.measured.append((workload, measured, work))
            spent = time.perf_counter() - start
            print(f"{report.duration(measured.ours.minimum)} ms (took {spent:.1f} s)", file=sys.stderr)
        self.measure_floors(self.workloads)

    def results(self) -> list[Result]:
        """Return the results beside their floors, which must be final."""
        found = []
        for workload, measured, work in self.measured:
            floors = self.floors[self.threads_of(workload)]
            found.append(
                Result(
                    measured,
                    floor=floors.wall.seconds(work),
                    cpu_floor=floors.cpu.seconds(work),
                    cpu_floor_with_fresh=floors.cpu.seconds_with_fresh(work),
                    bound=floors.cpu.bound(work),
                    flops=work.flops,
                )
            )
        return found

    def rates(self) -> dict[str, dict[str, dict[str, float]]]:
        """Return all rates, by clock (and number of threads where it is not the run's own), subject and who."""
        own = torch.get_num_threads()
        return {
            clock if threads == own else f"{clock}, {threads} threads": {
                **{f"GEMM {SHORT_NAMES[dtype]}": each for dtype, each in rates.gemm.items()},
                "memory": rates.memory,
            }
            for threads, floors in sorted(self.floors.items(), key=lambda item: item[0] != own)
            for clock, rates in (("wall", floors.wall), ("cpu", floors.cpu))
        }


def _write(run: Run, options: argparse.Namespace) -> None:
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(run.to_json())
    if options.record:
        _RECORDS.mkdir(exist_ok=True)
        pictures = []
        try:
            from benches import plots

            pictures = plots.draw(run, _RECORDS / options.record)
        except ImportError:
            print("no plots: matplotlib is not installed", file=sys.stderr)
        (_RECORDS / f"{options.record}.md").write_text(report.markdown(run, options.record, pictures))


def run_all(options: argparse.Namespace) -> int:
    """Run what the options select; return the exit status."""
    workloads = [] if options.no_times else _selected(options.filter)
    if not workloads and not options.no_times:
        print(f"no workload matches {options.filter!r}; --list shows them", file=sys.stderr)
        return 2
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    others = OtherWork()
    session = _Session(workloads, options.quick)
    session.measure_all()
    profiles = profiling.measure_all(options.filter, session.missing) if options.profile else []
    peaks = [] if options.no_memory or options.no_times else memory.measure_all(options.filter, session.missing)
    run = Run(
        machine=describe(),
        effort=asdict(session.full),
        other_cores=others.cores(),
        rates=session.rates(),
        results=session.results(),
        failures=session.failures,
        note=options.note,
        memory=peaks,
        profiles=profiles,
        missing=session.missing,
    )
    print(report.text(run))
    _write(run, options)
    return 1 if session.failures else 0
