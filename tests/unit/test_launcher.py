"""tutel.launcher: which processes it starts for what the environment says, and where it puts them."""

import os
import socket
import sys

from pytest import fixture, mark, raises, skip
from tutel.distributed import interface
from tutel.launcher import execl, run

from tutel import env

NAMES = ("OMPI_", "PMI_", "MPI_", "SLURM_", "LOCAL_", "MASTER_", "OMP_NUM", "NUMA_", "TUTEL_", "CUDA_", "RANK", "WORLD")
MPI = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}
SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "3", "SLURM_PROCID": "2", "SLURM_NODEID": "2"}
SLURM |= {"SLURM_STEP_TASKS_PER_NODE": "1(x3)", "SLURM_STEP_NODELIST": "gpu[08-09,12],cpu1"}


ALONE = "--standalone --local_addr=localhost"


@fixture
def variables():
    before = dict(os.environ)
    for name in [name for name in before if name.startswith(NAMES)]:
        del os.environ[name]
    yield os.environ.update
    os.environ.clear()
    os.environ.update(before)


def host(rank, count, address, port=23232):
    return f"--nnodes={count} --node_rank={rank} --master_addr={address} --master_port={port}"


@mark.parametrize(("given", "processes", "place"), [
    ({}, 1, ALONE),
    ({"LOCAL_SIZE": "4"}, 4, ALONE),
    # A batch script of Slurm is one process, though it has a task's variables.
    ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "3", "SLURM_PROCID": "0"}, 1, ALONE),
    ({"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0", "LOCAL_SIZE": "2"}, 2, host(0, 1, "localhost")),
    ({**MPI, "LOCAL_SIZE": "8", "MASTER_ADDR": "a"}, 8, host(1, 2, "a")),
    ({**MPI, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "99"}, 1, host(1, 2, "10.0.0.1", 99)),
    ({"PMI_SIZE": "2", "PMI_RANK": "0", "MASTER_ADDR": "a"}, 1, host(0, 2, "a")),
    ({**SLURM, "LOCAL_SIZE": "2"}, 2, host(2, 3, "gpu08")),
    ({**SLURM, "MASTER_ADDR": "a"}, 1, host(2, 3, "a")),
    # mpiexec in a job of Slurm.
    ({**SLURM, **MPI, "MASTER_ADDR": "a"}, 1, host(1, 2, "a")),
], ids=str)  # fmt: skip
def test_what_torch_is_told(given, processes, place, variables):
    variables(given)
    assert run.torch_arguments(env.launcher_task()) == [f"--nproc_per_node={processes}", *place.split()]


@mark.parametrize(("given", "message"), [
    ({**MPI}, "MASTER_ADDR must be the address of the first of 2 hosts"),
    ({"LOCAL_SIZE": "0"}, "LOCAL_SIZE must be at least 1, got 0"),
    ({"LOCAL_SIZE": "two"}, "LOCAL_SIZE must be an integer, got 'two'"),
    ({"MASTER_PORT": "70000"}, "MASTER_PORT must be from 1 to 65535, got 70000"),
    ({**MPI, "OMPI_COMM_WORLD_RANK": "2"}, "the environment says task 2 of 2"),
    ({**MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "LOCAL_SIZE": "3"}, "LOCAL_SIZE is 3, but 2 tasks"),
    ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "1,2(x2)", "LOCAL_SIZE": "3"}, "LOCAL_SIZE is 3, but 2 tasks"),
], ids=str)  # fmt: skip
def test_what_is_refused(given, message, variables, monkeypatch, capsys):
    variables(given)
    monkeypatch.setattr(os, "sched_setaffinity", lambda *_: None)
    assert run.main(["program.py"]) == 2
    assert f"tutel.launcher.run: {message}" in capsys.readouterr().err.replace("environment variable ", "")


@fixture
def became(monkeypatch):
    """What a process becomes, and the CPUs that it is bound to before."""
    calls = []
    monkeypatch.setattr(os, "execvp", lambda file, command: calls.append(command))
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cpus: calls.append(cpus))
    monkeypatch.setattr(execl, "local_memory", lambda: ["numactl", "--localalloc"])
    return calls


PROGRAM = ["-m", "package.program", "-m", "x", "--flag=1"]


def test_a_process_is_bound_and_becomes_the_program(variables, became):
    execl.main(PROGRAM)
    assert became == [os.sched_getaffinity(0), ["numactl", "--localalloc", sys.executable, "-u", *PROGRAM]]


def test_nothing_is_bound_where_that_is_asked_for(variables, became):
    variables({"NUMA_TYPE": "0"})
    execl.main(["folder/program.py", "-h"])
    assert became == [[sys.executable, "-u", "folder/program.py", "-h"]]


def test_a_task_among_others_of_its_host_is_one_process(variables, became):
    variables({**MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "2"})
    run.main(PROGRAM)
    assert became[-1][-len(PROGRAM) :] == PROGRAM
    assert 1 <= int(os.environ["OMP_NUM_THREADS"]) <= max(1, len(os.sched_getaffinity(os.getppid())) // 2)


@mark.parametrize(("sandbox", "visible", "local_rank", "expected"), [
    ("2", None, "1", "1"),
    ("2", "4,5,GPU-6", "2", "GPU-6"),
    ("0", "4,5", "1", "4,5"),
    (None, None, "1", None),
])  # fmt: skip
def test_a_process_sees_its_own_device(sandbox, visible, local_rank, expected, variables, became):
    given = {"TUTEL_CUDA_SANDBOX": sandbox, "CUDA_VISIBLE_DEVICES": visible, "LOCAL_RANK": local_rank}
    variables({name: value for name, value in given.items() if value is not None})
    execl.become(["program.py"])
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == expected


def test_too_few_devices_are_an_error(variables, became):
    variables({"TUTEL_CUDA_SANDBOX": "2", "CUDA_VISIBLE_DEVICES": "0", "LOCAL_RANK": "1"})
    with raises(ValueError, match="CUDA_VISIBLE_DEVICES=0 has no device for local rank 1"):
        execl.become(["program.py"])


@mark.parametrize(("script", "found"), [("exit 0", True), ("exit 1", False), (None, False)])
def test_local_memory_where_numactl_is_there_and_may(script, found, tmp_path, monkeypatch):
    command = tmp_path / "numactl"
    if script:
        command.write_text(f"#!/bin/sh\n{script}\n")
        command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert execl.local_memory() == ([str(command), "--localalloc"] if found else [])


@mark.parametrize("module", [run, execl])
def test_a_program_is_needed(module, capsys):
    with raises(SystemExit) as ended:
        module.main([])
    assert ended.value.code == 2
    assert "(-m MODULE | FILE) [argument ...]" in capsys.readouterr().err


def test_help_names_the_variables(capsys):
    with raises(SystemExit) as ended:
        run.main(["--help"])
    assert not ended.value.code
    printed = capsys.readouterr().out
    assert all(
        name in printed for name in ("mpiexec -host", "LOCAL_SIZE", "MASTER_ADDR", "NUMA_TYPE", "OMP_NUM_THREADS")
    )


@mark.parametrize(("address", "other"), [
    ("192.0.2.1", "192.0.2.2"),  # Gloo finds an address that others reach
    ("127.0.1.1", "localhost"),
    ("127.0.1.1", "no-such-host.invalid"),
    (None, "localhost"),
])  # fmt: skip
def test_no_interface_has_to_be_named(address, other, monkeypatch):
    def address_of(name):
        if address is None:
            raise OSError(name)
        return address

    monkeypatch.setattr(socket, "gethostbyname", address_of)
    assert interface.for_other_hosts(other, 23232) is None


def test_the_interface_of_this_hosts_address_is_named(monkeypatch):
    found = {interface._address(name): name for _, name in socket.if_nameindex()}
    assert found["127.0.0.1"] == "lo"
    addresses = [address for address in found if address and not address.startswith("127.")]
    if not addresses:
        skip("this machine has no address but its loopback's")
    monkeypatch.setattr(socket, "gethostbyname", lambda _: "127.0.1.1")
    assert interface.for_other_hosts(addresses[0], 23232) == found[addresses[0]]
