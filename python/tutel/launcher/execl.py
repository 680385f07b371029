"""Bind a process to its place on this host, then become a program: ``python3 -m tutel.launcher.execl -m MODULE ...``.

tutel.launcher.run starts it. The program is started anew instead of being imported here, so that all its threads, those
of libraries too, are made where they belong.
"""

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from typing import NoReturn

from tutel import env
from tutel.distributed import affinity, interface


def parse_program(arguments: Sequence[str] | None, description: str | None) -> list[str]:
    """Read a command line that is a program's: what ``python3`` takes, ``-m MODULE`` or ``FILE`` and arguments."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.usage = "%(prog)s [-h] (-m MODULE | FILE) [argument ...]"
    parser.add_argument("-m", dest="module", action="store_true", help="the program is a module")
    parser.add_argument("program", metavar="MODULE or FILE", help="the program")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="argument", help="its arguments")
    given = parser.parse_args(arguments)
    return [*(["-m"] if given.module else []), given.program, *given.arguments]


def become(program: list[str]) -> NoReturn:
    """Bind this process to the NUMA node of its local rank, and replace it by a program.

    Args:
        program: What ``python3`` takes.

    Raises:
        ValueError: If there is no CUDA device for this local rank, though each is to have its own; or if nothing says
            where the processes of several hosts meet.
    """
    launched = env.launch()
    if env.cuda_sandbox() == 2:
        env.show_one_cuda_device(launched.local_rank)
    interface.tell_gloo()
    bound = affinity.bind(launched.local_rank, env.numa_type()) is not None
    # Unbuffered, as torch.distributed.run starts programs: lines of several processes appear when they are written.
    command = [*(local_memory() if bound else []), sys.executable, "-u", *program]
    os.execvp(command[0], command)


def local_memory() -> list[str]:
    """Give the command that lets a program take memory from the node that it runs on, where that can be said.

    Linux does so by itself, unless the process that started this one was told otherwise (``numactl --interleave``).
    Containers often forbid such calls, and numactl may not be there: the result is empty then.
    """
    command = [shutil.which("numactl") or "", "--localalloc"]
    if not command[0] or subprocess.run([*command, "true"], stdin=subprocess.DEVNULL, capture_output=True).returncode:
        return []
    return command


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Become the program of the command line."""
    become(parse_program(arguments, __doc__))


if __name__ == "__main__":
    main()
