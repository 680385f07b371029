"""The command line of the benchmarks over several ranks."""

import argparse
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program."""
    parser = argparse.ArgumentParser(prog="python -m benches.distributed", description="Measure several ranks on Gloo.")
    add = parser.add_argument
    add("--ranks", default="2,4", metavar="W,..", help="numbers of ranks (default: %(default)s)")
    add("--quick", action="store_true", help="few rounds; for a look, not for a record")
    add("--record", metavar="NAME", help="write benches/record/distributed-NAME.md")
    add("--note", default="", help="a sentence for the record, such as what else ran on the machine")
    options = parser.parse_args(arguments)
    if re.fullmatch(r"[2-9]\d*(,[2-9]\d*)*", options.ranks) is None:
        parser.error(f"--ranks must be numbers from 2 on, separated by commas, got {options.ranks!r}")
    if options.record is not None and re.fullmatch(r"[\w.-]+", options.record) is None:
        parser.error(f"--record must be a plain file name without its ending, got {options.record!r}")

    from benches.distributed.ranks import RanksError, run_ranks
    from benches.distributed.report import markdown
    from benches.distributed.run import measure
    from benches.machine import OtherWork, describe

    machine, other, started, ours = describe(), OtherWork(), time.monotonic(), 0.0
    # The ranks have threads of their own, which each section tells.
    machine["torch"] = machine["torch"].split(",")[0]
    found = []
    for ranks in map(int, options.ranks.split(",")):
        print(f"{ranks} ranks ..", file=sys.stderr, flush=True)
        try:
            of_ranks = run_ranks(measure, ranks, options.quick, timeout=600)
        except RanksError as error:
            print(f"{ranks} ranks: {error}", file=sys.stderr)
            return 1
        found.append(of_ranks[0])
        ours += sum(one.cpu_seconds for one in of_ranks)
    # Ranks are no children of this process, so their work looks like that of others.
    others = max(0.0, other.cores() - ours / (time.monotonic() - started))
    command = f"python -m benches.distributed --ranks {options.ranks}" + (" --quick" if options.quick else "")
    text = markdown(found, machine, others, options.note, command)
    print(text)
    if options.record is not None:
        path = Path(__file__).parents[1] / "record" / f"distributed-{options.record}.md"
        path.write_text(text)
        print(f"wrote {path}", file=sys.stderr)
    return 0
