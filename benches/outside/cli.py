"""The command line. As in the other one, nothing here imports torch."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from benches.cli import settle_openmp


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program."""
    parser = argparse.ArgumentParser(
        prog="python -m benches.outside",
        description="Compare one sparse block with vLLM's and llama.cpp's, in processes that work by turns.",
    )
    add = parser.add_argument
    add("--peers", type=Path, default=Path(".venv-peers/bin/python"), metavar="PYTHON", help="the peers' interpreter")
    add("--filter", default="", metavar="REGEX", help="run the blocks whose name matches")
    add("--quick", action="store_true", help="for a look, not for a record")
    add("--threads", type=int, metavar="N", help="threads of every side (default: torch's own choice)")
    add("--json", type=Path, metavar="PATH", help="write the results there")
    add("--record", metavar="NAME", help="write benches/record/NAME.md")
    add("--note", default="", help="a sentence for the record, such as what else ran on the machine")
    options = parser.parse_args(arguments)
    # A relative path to an interpreter would be looked up elsewhere in the workers' folder; its links must stay.
    options.peers = options.peers.absolute()
    settle_openmp(options.threads)
    from benches.outside.run import run_all

    return run_all(options)
