"""Start a program's processes on this host: ``python3 -m tutel.launcher.run -m MODULE [argument ...]``.

Started by hand it is one host alone; started once a host by ``mpiexec`` or ``srun`` it is one of several:

    mpiexec -host A,B -x LOCAL_SIZE=8 -x MASTER_ADDR=A python3 -m tutel.launcher.run -m MODULE [argument ...]
    srun --ntasks-per-node=1 --export=ALL,LOCAL_SIZE=8 python3 -m tutel.launcher.run -m MODULE [argument ...]

It starts torch.distributed.run there, whose processes bind themselves to their NUMA nodes (tutel.launcher.execl) and
become the program. Where several tasks of mpiexec or srun are on one host, each of them is one process already, and
becomes the program.

environment:
  LOCAL_SIZE          processes of this host (default 1)
  MASTER_ADDR         address of the first host; needed for several hosts, but Slurm names it itself
  MASTER_PORT         where the processes meet there (default 23232)
  NUMA_TYPE           local ranks in a row that share a NUMA node (default 1); 0 binds nothing
  OMP_NUM_THREADS     threads of each process (default: the host's CPUs divided by LOCAL_SIZE)
  TUTEL_CUDA_SANDBOX  2: each process sees one CUDA device, its own
"""

import contextlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from torch.distributed import run as torch_run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from tutel import env
from tutel.launcher import execl


def torch_arguments(task: env.LauncherTask) -> list[str]:
    """Say to torch.distributed.run which host this is of how many.

    Raises:
        ValueError: If there are several hosts, and nothing says the address of the first.
    """
    shape = [f"--nproc_per_node={task.local_size or 1}"]
    if task.count == 0:
        # One host alone: nobody else has to know the port, so any free one does.
        return [*shape, "--standalone", "--local_addr=localhost"]
    if not task.master_addr:
        raise ValueError(f"MASTER_ADDR must be the address of the first of {task.count} hosts: -x MASTER_ADDR=...")
    shape += [f"--nnodes={task.count}", f"--node_rank={task.rank}"]
    return [*shape, f"--master_addr={task.master_addr}", f"--master_port={task.master_port}"]


def take_whole_host() -> None:
    """Undo mpiexec's binding of this task, to one core by default: it stands for a host.

    It may use what the process may that started it, so limits of containers, schedulers and users hold.
    """
    # A sandbox may forbid it: the binding stays then, which makes processes slow, but not wrong.
    with contextlib.suppress(OSError):
        os.sched_setaffinity(0, os.sched_getaffinity(os.getppid()) | os.sched_getaffinity(0))


def start_one(program: list[str], task: env.LauncherTask) -> NoReturn:
    """Become the program: this task, one of several on its host, is one process of it."""
    if task.local_size not in (0, task.here):
        raise ValueError(
            f"LOCAL_SIZE is {task.local_size}, but {task.here} tasks were started on this host: start one a host "
            "(mpiexec --map-by ppr:1:node, srun --ntasks-per-node=1), or leave LOCAL_SIZE away"
        )
    whole_host = len(os.sched_getaffinity(os.getppid()))
    env.default_omp_num_threads(max(1, min(len(os.sched_getaffinity(0)), whole_host // task.here)))
    execl.become(program)


def start_all(program: list[str], task: env.LauncherTask) -> int:
    """Start the processes of this host and wait for them; return the exit status of the first that failed, or 0."""
    if task.by_mpi:
        take_whole_host()
    env.default_omp_num_threads(max(1, len(os.sched_getaffinity(0)) // max(1, task.local_size)))
    try:
        torch_run.main([*torch_arguments(task), "-m", "tutel.launcher.execl", *program])
    except ChildFailedError as failed:
        print(failed, file=sys.stderr)
        status: int = failed.get_first_failure()[1].exitcode
        # A process that a signal ended has minus its number; shells add it to 128.
        return status if status >= 0 else 128 - status
    except SignalException as ended:
        print(f"tutel.launcher.run: {ended}", file=sys.stderr)
        return 128 + int(ended.sigval)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a program; return the exit status."""
    program = execl.parse_program(arguments, __doc__)
    try:
        task = env.launcher_task()
        return start_one(program, task) if task.here > 1 else start_all(program, task)
    except ValueError as wrong:
        print(f"tutel.launcher.run: {wrong}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
