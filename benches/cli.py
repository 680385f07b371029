"""The command line. Nothing here imports torch: OpenMP reads its settings once, when torch loads it."""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benches", description="Compare tutel with plain PyTorch.")
    add = parser.add_argument
    add("--filter", default="", metavar="REGEX", help="run the workloads whose name matches")
    add("--quick", action="store_true", help="a tenth of the time; for a look, not for a record")
    add("--threads", type=int, metavar="N", help="threads of torch (default: torch's own choice)")
    add("--no-memory", action="store_true", help="leave out peak memory, which takes a process a training step")
    add("--profile", action="store_true", help="also show where processor time goes, by perf")
    add("--no-times", action="store_true", help="with --profile: nothing but that")
    add("--json", type=Path, metavar="PATH", help="write the results there")
    add("--record", metavar="NAME", help="write benches/record/NAME.md, and its plots")
    add("--note", default="", help="a sentence for the record, such as what else ran on the machine")
    add("--compare", type=Path, nargs=2, metavar=("A.json", "B.json"), help="print B beside A, run nothing")
    add("--list", action="store_true", help="print the workloads' names, run nothing")
    options = parser.parse_args(arguments)
    if options.threads is not None and options.threads < 1:
        parser.error(f"--threads must be at least 1, got {options.threads}")
    if options.record is not None and re.fullmatch(r"[\w.-]+", options.record) is None:
        parser.error(f"--record must be a plain file name without its ending, got {options.record!r}")
    if options.no_times and not options.profile:
        parser.error("--no-times leaves nothing to do without --profile")
    try:
        re.compile(options.filter)
    except re.error as error:
        parser.error(f"--filter must be a regular expression: {error}")
    return options


def settle_openmp(threads: int | None) -> None:
    """Set how OpenMP waits.

    Threads that spin while they wait lose their core to whatever else runs and then stall a whole step in units of
    4 ms; threads that sleep do not. What the user has set stays.
    """
    if not {"OMP_WAIT_POLICY", "OMP_PROC_BIND"} & set(os.environ):
        os.environ["OMP_WAIT_POLICY"] = "passive"
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program."""
    options = parse_arguments(arguments)
    if options.compare:
        from benches.compare import compare_files

        try:
            print(compare_files(*options.compare))
        except (OSError, ValueError) as error:
            print(error, file=sys.stderr)
            return 2
        return 0
    settle_openmp(options.threads)
    from benches.run import list_names, run_all

    if options.list:
        print("\n".join(list_names(options.filter)))
        return 0
    return run_all(options)
