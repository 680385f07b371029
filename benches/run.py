"""The run: floors and workloads by turns, then the reports."""

import argparse
import gc
import re
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from benches import report
from benches.floors import Floors, Work
from benches.harness import FULL, QUICK, Effort, Spread, alternate, pairwise_ratio
from benches.machine import OtherWork, describe
from benches.results import Measured, PeerResult, Result, Run
from benches.workload import SHORT_NAMES, DisagreementError, Workload, check_agreement
from benches.workloads import ALL

_RECORDS = Path(__file__).parent / "record"


def _selected(pattern: str) -> list[Workload]:
    return [workload for workload in ALL if re.search(pattern, workload.name)]


def list_names(pattern: str) -> list[str]:
    """Return the names of the workloads that match."""
    return [workload.name for workload in _selected(pattern)]


def _measure(workload: Workload, effort: Effort) -> tuple[Measured, Work]:
    torch.manual_seed(0)
    case = workload.build()
    check_agreement(case)
    others = OtherWork()
    samples = alternate([case.ours.run, *(peer.run for peer in case.peers)], effort, case.turns)
    wall = [Spread.of([sample.wall for sample in times]) for times in samples]
    cpu = min(sample.cpu for sample in samples[0]) / torch.get_num_threads()
    peers = [
        PeerResult(peer.name, spread, pairwise_ratio(samples[0], times))
        for peer, spread, times in zip(case.peers, wall[1:], samples[1:], strict=True)
    ]
    return Measured(workload.name, wall[0], cpu, len(samples[0]), others.cores(), peers), case.work


def _measure_all(
    workloads: list[Workload], effort: Effort, floors: Floors, failures: dict[str, str]
) -> list[tuple[Measured, Work]]:
    """Measure; workloads whose sides do not agree go to ``failures`` instead.

    Floors are measured anew before each subject, so that one busy moment does not lower them.
    """
    measured = []
    subject = ""
    for workload in workloads:
        if workload.subject != subject:
            subject = workload.subject
            same = {other.dtype for other in workloads if other.subject == subject}
            floors.measure(same, effort.seconds)
        print(f"{workload.name} ...", end=" ", file=sys.stderr, flush=True)
        try:
            measured.append(_measure(workload, effort))
        except DisagreementError as error:
            # The other workloads' results stay good, and may have taken long.
            failures[workload.name] = str(error)
            print(f"the sides do not agree: {error}", file=sys.stderr)
            continue
        finally:
            gc.collect()
        print(f"{report.duration(measured[-1][0].ours.minimum)}", file=sys.stderr)
    return measured


def run_all(options: argparse.Namespace) -> int:
    """Run what the options select; return the exit status."""
    workloads = _selected(options.filter)
    if not workloads:
        print(f"no workload matches {options.filter!r}; --list shows them", file=sys.stderr)
        return 2
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    effort = QUICK if options.quick else FULL
    floors = Floors()
    others = OtherWork()
    failures: dict[str, str] = {}
    measured = _measure_all(workloads, effort, floors, failures)
    floors.measure({workload.dtype for workload in workloads}, effort.seconds)
    run = Run(
        machine=describe(),
        effort=asdict(effort),
        other_cores=others.cores(),
        rates={
            clock: {
                **{f"GEMM {SHORT_NAMES[dtype]}": each for dtype, each in rates.gemm.items()},
                "memory": rates.memory,
            }
            for clock, rates in (("wall", floors.wall), ("cpu", floors.cpu))
        },
        # Only now are the floors final.
        results=[
            Result(
                one,
                floor=floors.wall.seconds(work),
                cpu_floor=floors.cpu.seconds(work),
                cpu_floor_with_fresh=floors.cpu.seconds_with_fresh(work),
                bound=floors.cpu.bound(work),
            )
            for one, work in measured
        ],
        failures=failures,
        note=options.note,
    )
    print(report.text(run))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(run.to_json())
    if options.record:
        _RECORDS.mkdir(exist_ok=True)
        (_RECORDS / f"{options.record}.md").write_text(report.markdown(run, options.record))
    return 1 if failures else 0
