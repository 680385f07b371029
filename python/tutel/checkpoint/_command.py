"""What the command lines have in common."""

import argparse
import signal
import sys
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

from tutel.checkpoint.errors import CheckpointError
from tutel.checkpoint.older import FILE_LAYOUTS


def parser(description: str | None) -> argparse.ArgumentParser:
    """Make a command line."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )


def add_state_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of both directions."""
    add = parser.add_argument
    add("--namespace", default="", metavar="NAME", help="entry of PyTorch's files that holds the state: model, or a/b")
    add("--default_num_global_experts", type=int, metavar="E", help="experts of layers in files that do not tell")
    add("--layout", choices=FILE_LAYOUTS, help="of the experts, where names and shapes do not tell")
    add("--model_dim", type=int, metavar="D", help="for flat weights of llama_ffn, where the gate does not tell")
    add(
        "--shard_dim",
        action="append",
        default=[],
        metavar="NAME=DIM",
        help="dimension along which ranks that share an expert of a custom class cut its parameter experts.NAME; again "
        "for each",
    )
    add("--unchecked", action="store_true", help="do not compare the checksums of PyTorch's files first")


def state_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the options of both directions for the functions.

    Raises:
        ValueError: If a dimension is none.
    """
    shard_dims = {}
    for given in arguments.shard_dim:
        name, _, dim = given.rpartition("=")
        if not name or not dim.isdecimal():
            raise ValueError(f"--shard_dim must be NAME=DIM, got {given!r}")
        shard_dims[name] = int(dim)
    return {
        "namespace": arguments.namespace,
        "default_num_global_experts": arguments.default_num_global_experts,
        "layout": arguments.layout,
        "model_dim": arguments.model_dim,
        "shard_dims": shard_dims,
        "check": not arguments.unchecked,
    }


def run(act: Callable[[], object]) -> None:
    """Do what a command is for; what is wrong with its files and options is one line, with status 1."""
    # A terminated command takes its unfinished files with it, as an interrupted one does.
    before, form = signal.signal(signal.SIGTERM, _terminated), warnings.formatwarning
    warnings.formatwarning = _format_warning
    try:
        act()
    except (CheckpointError, ValueError, TypeError, ImportError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        warnings.formatwarning = form
        signal.signal(signal.SIGTERM, before)


def _terminated(number: int, _frame: object) -> NoReturn:
    sys.exit(128 + number)


def _format_warning(message: Warning | str, *_: object, **__: object) -> str:
    return f"warning: {message}\n"
