"""tutel.system: start-up of one process, affinity, time, files."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed
import tutel.system_init
from pytest import approx, fixture, mark, raises, warns
from tutel.distributed import affinity, groups

from tutel import system

pytestmark = mark.usefixtures("no_launcher_and_no_session")


@fixture
def without_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


# init_data_model_parallel

ATTRIBUTES = [
    *("global_rank", "global_size", "group_count", "data_rank", "model_rank", "model_size", "local_rank", "local_size"),
    *("data_group", "model_group", "global_group", "local_device", "is_distributed", "is_cuda", "dist_print"),
]


@mark.parametrize("variables", [{}, {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}])
@mark.parametrize("backend", ["nccl", "gloo", "mpi"])
def test_one_process_starts_no_process_group(monkeypatch, without_cuda, variables, backend):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    session = system.init_data_model_parallel(backend=backend)
    assert session.local_device == torch.device("cpu")
    assert (session.global_rank, session.global_size, session.local_rank, session.local_size) == (0, 1, 0, 1)
    assert not session.is_cuda
    assert not session.is_distributed
    assert not torch.distributed.is_initialized()


def test_attributes_are_on_the_function_too(without_cuda):
    with raises(RuntimeError, match="there is no session yet"):
        system.get_local_session()
    start = system.init_data_model_parallel
    session = start(group_count=1)
    assert start.default_env is system.get_local_session() is session
    for name in ATTRIBUTES:
        assert getattr(start, name) == getattr(session, name)
    assert start(-1) is session


def test_local_rank_of_minus_one_on_a_host_without_gpus(monkeypatch, without_cuda):
    monkeypatch.setenv("LOCAL_RANK", "-1")
    session = system.init_data_model_parallel()
    assert session.local_rank == 0
    torch.ones(2, device=session.local_device)


def test_bad_arguments():
    with raises(ValueError, match=r"group_count must divide the number of ranks \(1\)"):
        system.init_data_model_parallel(2)
    with raises(ValueError, match="backend must be one of nccl, gloo, mpi"):
        system.init_data_model_parallel(backend="smoke signals")


@mark.skipif(torch.distributed.is_mpi_available(), reason="this PyTorch has MPI")
def test_a_backend_that_is_not_built_in(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_SIZE", "2")
    with raises(RuntimeError, match="built without MPI: use the backend 'gloo' or 'nccl', also under mpiexec"):
        system.init_data_model_parallel(backend="mpi")


def test_printing_on_the_first_rank_only(capsys, without_cuda):
    session = system.init_data_model_parallel()
    session.dist_print("a", 1, sep="-")
    assert capsys.readouterr().out == "a-1\n"


@mark.parametrize(("devices", "local_rank", "index"), [(1, 0, 0), (1, 3, 0), (4, 3, 3)])
def test_device_of_a_local_rank(monkeypatch, devices, local_rank, index):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    assert groups.cuda_device(local_rank) == torch.device("cuda", index)


def test_no_two_ranks_share_a_device_unasked(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with raises(ValueError, match="local rank 2 has no CUDA device of its own: this process sees 2"):
        groups.cuda_device(2)


@mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_session_computes_on_cuda():
    session = system.init_data_model_parallel()
    assert session.is_cuda
    assert session.local_device == torch.device("cuda", torch.cuda.current_device())
    assert not system.init_data_model_parallel(backend="gloo").is_cuda


# Affinity


def write_nodes(folder, **lists):
    for name, text in lists.items():
        (folder / name).mkdir()
        (folder / name / "cpulist").write_text(text)
    (folder / "online").write_text("0-1\n")
    return folder


@mark.parametrize(("text", "cpus"), [("0-3\n", {0, 1, 2, 3}), ("0,2-3,8", {0, 2, 3, 8}), ("\n", set()), ("5", {5})])
def test_reading_cpu_lists(text, cpus):
    assert affinity.parse_cpus(text) == cpus


def test_ranks_go_round_the_nodes_that_have_allowed_cpus(tmp_path):
    # node1 has memory only, node10 sorts after node2.
    nodes = write_nodes(tmp_path, node0="0-3", node1="", node2="4-7", node10="8-11")
    allowed = {2, 3, 8, 9}
    assert [affinity.choose_cpus(turn, allowed, nodes) for turn in range(3)] == [{2, 3}, {8, 9}, {2, 3}]
    with raises(ValueError, match=r"has one of the CPUs \[20\]"):
        affinity.choose_cpus(0, {20}, nodes)


@fixture
def bound(monkeypatch):
    """The calls that bind this process, of which none is made."""
    calls = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0, 1, 4, 5})
    monkeypatch.setattr(os, "sched_setaffinity", lambda _pid, cpus: calls.append(cpus))
    return calls


@mark.parametrize(
    ("local_rank", "ranks_per_node", "cpus"),
    [(0, 1, {0, 1}), (1, 1, {4, 5}), (2, 1, {0, 1}), (1, 2, {0, 1}), (2, 2, {4, 5})],
)
def test_binding(tmp_path, bound, local_rank, ranks_per_node, cpus):
    nodes = write_nodes(tmp_path, node0="0-3", node1="4-7")
    assert affinity.bind(local_rank, ranks_per_node, nodes) == cpus
    assert bound == [cpus]


def test_binding_can_be_switched_off(monkeypatch, bound):
    monkeypatch.setenv("NUMA_TYPE", "0")
    system.init_affinity_at_program_beginning()
    assert bound == []


def test_binding_that_fails_is_a_warning(monkeypatch, tmp_path, bound):
    monkeypatch.setattr(affinity.bind, "__defaults__", (tmp_path / "nothing",))
    with warns(RuntimeWarning, match="the process is not bound to a NUMA node: .*nothing"):
        system.init_affinity_at_program_beginning()
    monkeypatch.delattr(os, "sched_getaffinity")
    with warns(RuntimeWarning, match="not bound to a NUMA node"):
        system.init_affinity_at_program_beginning()


@mark.skipif(not affinity.NODES.exists(), reason="this system lists no NUMA nodes")
def test_binding_this_process_adds_no_cpu():
    program = """if True:
        import os
        from tutel import system
        allowed = {min(os.sched_getaffinity(0))}
        os.sched_setaffinity(0, allowed)
        system.init_affinity_at_program_beginning()
        assert os.sched_getaffinity(0) == allowed
    """
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True)


# Time


@mark.parametrize("is_cuda", [None, False])
def test_time_is_in_seconds_and_runs_forward(is_cuda):
    times = [system.record_time(is_cuda) for _ in range(100)]
    assert times == sorted(times)


@mark.parametrize(("asked", "session", "used", "waits"), [
    (True, None, False, 1), (False, True, True, 0), (None, True, False, 1), (None, False, True, 0),
    (None, None, True, 1), (None, None, False, 0),
])  # fmt: skip
def test_time_waits_for_cuda_where_it_is_used(monkeypatch, asked, session, used, waits):
    calls = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append(1))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: used)
    if session is not None:
        fake = type("Session", (), {"is_cuda": session})
        system.init_data_model_parallel.default_env = fake
    system.record_time(asked)
    assert len(calls) == waits


def test_perform_gives_the_average_of_its_runs(monkeypatch):
    clock = iter([10.0, 16.0])
    monkeypatch.setattr(system, "record_time", lambda: next(clock))
    calls = []
    assert system.perform(lambda: calls.append(1), num_runs=4) == approx(1.5)
    assert len(calls) == 5
    with raises(ValueError, match="num_runs must be at least 1, got 0"):
        system.perform(lambda: None, num_runs=0)


# Files


@mark.parametrize("name", ["x.npy", "x"])
@mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.int64, torch.bool])
def test_save_and_load(tmp_path, name, dtype):
    value = torch.arange(6).reshape(2, 3).to(dtype)
    if dtype.is_floating_point:
        value.requires_grad_()
    system.save(value, tmp_path / name)
    assert np.array_equal(np.load(tmp_path / "x.npy"), value.detach().numpy())
    loaded = system.load(str(tmp_path / name), device="cpu")
    assert torch.equal(loaded, value)
    assert loaded.dtype == dtype


def test_what_cannot_be_saved_or_loaded(tmp_path):
    with raises(TypeError, match=r"t must be a torch\.Tensor, got list"):
        system.save([1.0], tmp_path / "x.npy")
    with raises(TypeError, match="BFloat16"):
        system.save(torch.ones(2, dtype=torch.bfloat16), tmp_path / "x.npy")
    with raises(FileNotFoundError):
        system.load(tmp_path / "y")
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    with raises(ValueError, match="allow_pickle=False"):
        system.load(tmp_path / "objects.npy")


def test_cache():
    store = system.cache()
    store.set("a", 1)
    store.set("b", 2)
    assert (store.get("a"), store.get(), store.get("c")) == (1, [1, 2], [1, 2])
    store.reset()
    assert system.cache().get() == []

    calls = []

    @system.cache
    def square(x):
        calls.append(x)
        return x * x

    assert (square(3), square(3), calls) == (9, 9, [3])


@mark.parametrize(
    ("pattern", "expected"),
    [
        ("a/{rank}-of-{size}.pt", "a/1-of-4.pt"),
        ("{size}/{rank}/{rank}", "4/1/1"),
        ("b/c/{rank}", "b/c/1"),
        ("{rank}{other}{}.pt", "1{other}{}.pt"),
    ],
)
def test_file_of_a_rank(tmp_path, pattern, expected):
    name = system.apply_rank_size_from_pattern(f"{tmp_path}/x/{pattern}", rank=1, size=4)
    assert name == f"{tmp_path}/x/{expected}"
    Path(name).touch()


def test_file_of_a_rank_in_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert system.apply_rank_size_from_pattern("{rank}.pt", 0, 1) == "0.pt"
    assert system.apply_rank_size_from_pattern("model.pt", 0, 1) == "model.pt"
    assert system.apply_rank_size_from_pattern("no/{rank}.pt", 0, 1, create_dir=False) == "no/0.pt"
    assert list(tmp_path.iterdir()) == []


def test_file_that_several_ranks_would_share(tmp_path):
    with warns(UserWarning, match="the same file on all 2 ranks"):
        assert system.apply_rank_size_from_pattern(f"{tmp_path}/model.pt", 1, 2) == f"{tmp_path}/model.pt"
    for rank, size in ((2, 2), (-1, 2), (0, 0)):
        with raises(ValueError, match="must be"):
            system.apply_rank_size_from_pattern("{rank}", rank, size)


# Programs


def test_the_older_name():
    assert tutel.system_init.__all__ == system.__all__
    assert all(getattr(tutel.system_init, name) is getattr(system, name) for name in system.__all__)


def test_a_program_that_fails_says_so():
    program = "from tutel import system_init as s; s.init_data_model_parallel(); raise RuntimeError('broken')"
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert done.stderr.endswith("RuntimeError: broken\n")
