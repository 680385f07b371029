"""Every way to launch on one host: the same losses, the program's exit status, the whole host for its processes."""

import contextlib
import functools
import io
import json
import os
import signal
from pathlib import Path

from programs import TINY, finish, losses, need, run, started
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


#: Says what it sees. When both processes are there, rank 1 ends as it was told, and rank 0 waits to be ended.
PROBE = """
import json, os, signal, sys, time
_, met, ending, *rest = sys.argv
names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"]
seen = {"pid": os.getpid(), "cpus": sorted(os.sched_getaffinity(0)), "rest": rest}
print(json.dumps(seen | {name: os.environ[name] for name in names}), flush=True)
open(f"{met}/{os.environ['RANK']}", "w").close()
while len(os.listdir(met)) < 2:
    time.sleep(0.01)
if os.environ["RANK"] == "1":
    if ending == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if ending != "waits":
        sys.exit(int(ending))
time.sleep(60)
"""


@fixture
def probe(tmp_path):
    (tmp_path / "met").mkdir()
    (tmp_path / "probe.py").write_text(PROBE)
    return [tmp_path / "probe.py", tmp_path / "met"]


def test_processes_under_mpiexec_have_the_whole_host_and_give_their_exit_status(probe):
    need("mpiexec", "openmpi-bin")
    variables = {"LOCAL_SIZE": "2", "MASTER_PORT": str(free_port()), "TUTEL_CUDA_SANDBOX": "2"}
    printed = run([*MPIEXEC, "-host", "localhost", *LAUNCHER, *probe, "7", "-m", "--help"], 7, **variables)
    seen = sorted((json.loads(line) for line in printed.splitlines()), key=lambda one: one["RANK"])
    assert [one["rest"] for one in seen] == [["-m", "--help"]] * 2
    for name in ("RANK", "LOCAL_RANK", "CUDA_VISIBLE_DEVICES"):
        assert [one[name] for one in seen] == ["0", "1"], name
    cpus = os.sched_getaffinity(0)
    assert {one["OMP_NUM_THREADS"] for one in seen} == {str(max(1, len(cpus) // 2))}
    # Each is bound to its NUMA node, and not to the one core that mpiexec gave the launcher.
    assert all(set(one["cpus"]) <= cpus for one in seen)
    assert len(seen[0]["cpus"]) > 1 or len(cpus) == 1


def test_a_signal_ends_the_launcher_and_its_processes(probe):
    with started([*LAUNCHER, *probe, "waits"], LOCAL_SIZE="2", TUTEL_CUDA_SANDBOX="2") as launcher:
        pids = [json.loads(launcher.stdout.readline())["pid"] for _ in range(2)]
        launcher.terminate()
        finish(launcher, 128 + signal.SIGTERM)
    assert [pid for pid in pids if Path(f"/proc/{pid}").exists()] == []


def test_the_exit_status_of_a_program_that_a_signal_ended(probe):
    run([*LAUNCHER, *probe, "killed"], 128 + signal.SIGKILL, LOCAL_SIZE="2", TUTEL_CUDA_SANDBOX="2")
