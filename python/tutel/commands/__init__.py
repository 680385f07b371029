"""The command ``tutel``: one module a subcommand, each with ``add(subcommands)``."""

import argparse
from collections.abc import Sequence

from tutel import __version__
from tutel.commands import plan

_SUBCOMMANDS = (plan,)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand and return the exit status: 0, 1 where it failed, 2 where it was called wrongly.

    Args:
        arguments: What follows the program's name; None takes the process's own.
    """
    parser = argparse.ArgumentParser(prog="tutel", description="Tools around tutel's Mixture-of-Experts layer.")
    parser.add_argument("--version", action="version", version=f"tutel {__version__}")
    subcommands = parser.add_subparsers(metavar="COMMAND", required=True)
    for module in _SUBCOMMANDS:
        module.add(subcommands)
    options = parser.parse_args(arguments)
    status: int = options.run(options)
    return status
