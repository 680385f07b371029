"""Every way to launch on one host: the same losses, the program's exit status, the whole host for its processes."""

import contextlib
import functools
import io
import json
import os
from pathlib import Path

from programs import TINY, losses, need, run
from pytest import fixture, mark
from ranks import free_port, run_ranks

EXAMPLES = Path(__file__).parents[2] / "tutel" / "examples"
MPIEXEC = ["mpiexec", "--allow-run-as-root", "--oversubscribe"]
LAUNCHER = ["python3", "-m", "tutel.launcher.run"]


def main_of_helloworld(*arguments):
    from tutel.examples import helloworld

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        helloworld.main([*TINY, *arguments])
    return printed.getvalue()


@functools.cache
def expected(world_size, *arguments):
    """The losses of processes that no launcher started."""
    return losses(run_ranks(main_of_helloworld, world_size, *arguments)[0])


@mark.parametrize(("launcher", "program"), [
    ("run", ["-m", "tutel.examples.helloworld"]),
    # It passes --local-rank to the program.
    ("launch", [EXAMPLES / "helloworld.py"]),
])  # fmt: skip
def test_launchers_of_torch(launcher, program):
    place = ["--nproc_per_node=2", f"--master_port={free_port()}"]
    assert losses(run(["python3", "-m", f"torch.distributed.{launcher}", *place, *program, *TINY])) == expected(2)


def test_one_task_of_mpiexec_becomes_two_processes():
    need("mpiexec", "openmpi-bin")
    variables = ["-x", "LOCAL_SIZE=2", "-x", f"MASTER_PORT={free_port()}"]
    printed = run([*MPIEXEC, "-host", "localhost", *variables, *LAUNCHER, "-m", "tutel.examples.helloworld", *TINY])
    assert losses(printed) == expected(2)


def test_two_tasks_of_mpiexec_are_two_processes():
    need("mpiexec", "openmpi-bin")
    port = ["-x", f"MASTER_PORT={free_port()}"]
    assert losses(run([*MPIEXEC, "-n", "2", *port, "python3", "-m", "tutel.examples.helloworld", *TINY])) == expected(2)


PROBE = """
import json, os, signal, sys, time
names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"]
print(json.dumps([sys.argv[1:], *(os.environ[name] for name in names), sorted(os.sched_getaffinity(0))]), flush=True)
with open(f"{sys.argv[1]}/{os.environ['RANK']}", "w"):
    while len(os.listdir(sys.argv[1])) < 2:
        time.sleep(0.01)
if os.environ["RANK"] == "1":
    os.kill(os.getpid(), signal.SIGKILL) if sys.argv[2] == "killed" else sys.exit(int(sys.argv[2]))
time.sleep(60 if sys.argv[2] != "0" else 0)
"""


@fixture
def probe(tmp_path):
    (tmp_path / "met").mkdir()
    (tmp_path / "probe.py").write_text(PROBE)
    return [tmp_path / "probe.py", tmp_path / "met"]


@mark.parametrize(("ending", "status"), [("0", 0), ("7", 7)])
def test_processes_under_mpiexec_have_the_whole_host(ending, status, probe):
    need("mpiexec", "openmpi-bin")
    variables = {"LOCAL_SIZE": "2", "MASTER_PORT": str(free_port()), "TUTEL_CUDA_SANDBOX": "2"}
    printed = run([*MPIEXEC, "-host", "localhost", *LAUNCHER, *probe, ending, "-m"], status, **variables)
    cpus = sorted(os.sched_getaffinity(0))
    threads = str(max(1, len(cpus) // 2))
    rows = sorted((json.loads(line) for line in printed.splitlines()), key=lambda row: row[1])
    assert [row[:-1] for row in rows] == [
        [[str(probe[1]), ending, "-m"], rank, rank, "2", threads, rank] for rank in ("0", "1")
    ]
    # Each has all CPUs of its node: on a machine with one node, all.
    assert all(set(row[-1]) <= set(cpus) for row in rows)
    assert len(rows[0][-1]) > 1 or len(cpus) == 1


def test_the_exit_status_of_a_program_that_a_signal_ended(probe):
    run([*LAUNCHER, *probe, "killed"], 128 + 9, LOCAL_SIZE="2", TUTEL_CUDA_SANDBOX="2")
