"""Where a launcher placed a process, and what the environment sets."""

from pytest import mark, raises

from tutel import env, system

pytestmark = mark.usefixtures("no_launcher_and_no_session")


def test_no_launcher():
    assert env.launch() == env.Launch(rank=0, world_size=1, local_rank=0, local_size=1)


TORCH = {"RANK": 3, "WORLD_SIZE": 4, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2}
SLURM = {"SLURM_PROCID": 3, "SLURM_NTASKS": 5, "SLURM_LOCALID": 1, "SLURM_NODEID": 1}
HOSTS = {"SLURM_NNODES": 2}
OPEN_MPI = {f"OMPI_COMM_WORLD_{name}": value for name, value in [("RANK", 1), ("SIZE", 2), ("LOCAL_RANK", 0)]}


@mark.parametrize(
    ("variables", "expected"),
    [
        (TORCH, (3, 4, 1, 2)),
        (OPEN_MPI, (1, 2, 0, 1)),
        ({**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": 2}, (1, 2, 0, 2)),
        ({**OPEN_MPI, "LOCAL_SIZE": 2}, (1, 2, 0, 2)),
        ({"PMI_RANK": 2, "PMI_SIZE": 4, "MPI_LOCALRANKID": 0, "MPI_LOCALNRANKS": 2}, (2, 4, 0, 2)),
        ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "2(x2),1"}, (3, 5, 1, 2)),
        ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "3,2", "SLURM_JOB_ID": 7, "SLURM_STEP_ID": 0}, (3, 5, 1, 2)),
        ({**SLURM, "SLURM_NNODES": 1}, (3, 5, 1, 5)),
        ({**SLURM, "SLURM_NNODES": 2}, (3, 5, 1, 1)),
        # A batch script has the variables of its job, and is one process.
        ({**SLURM, "SLURM_JOB_ID": 7}, (0, 1, 0, 1)),
        # Slurm starts the others' launchers.
        ({**SLURM, **OPEN_MPI}, (1, 2, 0, 1)),
        ({**SLURM, **TORCH}, (3, 4, 1, 2)),
        # torch's launcher, started once on each host by Open MPI: the inner one says who this is.
        ({**OPEN_MPI, **TORCH}, (3, 4, 1, 2)),
        ({"LOCAL_RANK": -1}, (0, 1, 0, 1)),
        ({"LOCAL_SIZE": 8}, (0, 1, 0, 1)),
        ({"RANK": "", "WORLD_SIZE": ""}, (0, 1, 0, 1)),
    ],
)
def test_launchers(monkeypatch, variables, expected):
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    assert env.launch() == env.Launch(*expected)
    assert env.local_rank() == expected[2]


@mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "4", "WORLD_SIZE": "4"}, "rank 4 of 4 processes"),
        ({"RANK": "1"}, "rank 1 of 1 processes"),
        ({"RANK": "-1"}, "rank -1 of 1 processes"),
        ({"WORLD_SIZE": "two"}, "environment variable WORLD_SIZE must be an integer, got 'two'"),
        ({"SLURM_PROCID": "2", "SLURM_NTASKS": "2"}, "rank 2 of 2 processes"),
        (
            {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2x"},
            r"SLURM_STEP_TASKS_PER_NODE must be a list such as 4\(x2\),1, got '2x'",
        ),
    ],
)
def test_launchers_that_contradict_themselves(monkeypatch, variables, message):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with raises(ValueError, match=message):
        system.init_data_model_parallel()


@mark.parametrize(
    ("variables", "expected"),
    [
        ({"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}, ("localhost", 23456, 0, False, 1)),
        ({"MASTER_ADDR": "there", "MASTER_PORT": 1234, "WORLD_SIZE": 2}, ("there", 1234, 0, False, 1)),
        ({**SLURM, **HOSTS, "SLURM_NODELIST": "node[07-09,12],other"}, ("node07", 23456, 0, False, 1)),
        ({**SLURM, **HOSTS, "SLURM_STEP_NODELIST": "a1,b[1-2]"}, ("a1", 23456, 0, False, 1)),
        ({**SLURM, **HOSTS, "SLURM_NODELIST": "rack[2-3]n[5,7].net"}, ("rack2n5.net", 23456, 0, False, 1)),
        (
            {
                "MASTER_ADDR": "a",
                "TORCHELASTIC_RESTART_COUNT": 2,
                "TORCHELASTIC_USE_AGENT_STORE": "True",
                "GROUP_WORLD_SIZE": 3,
            },
            ("a", 23456, 2, True, 3),
        ),
    ],
)
def test_where_processes_meet(monkeypatch, variables, expected):
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    assert env.meeting() == env.Meeting(*expected)


@mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "4", "LOCAL_SIZE": "2"}, "MASTER_ADDR must name the host of rank 0: 2 of the 4 processes are"),
        ({"MASTER_ADDR": "a", "MASTER_PORT": "0"}, "MASTER_PORT must be from 1 to 65535, got 0"),
    ],
)
def test_places_that_cannot_be(monkeypatch, variables, message):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with raises(ValueError, match=message):
        env.meeting()
    monkeypatch.setenv("WORLD_SIZE", "4")
    with raises(ValueError, match=message):
        system.init_data_model_parallel(backend="gloo")


SETTINGS = [
    (
        "TUTEL_GLOBAL_TIMEOUT_SEC",
        env.global_timeout,
        {None: 1800.0, "20": 20.0, "0.5": 0.5},
        ("0", "-1", "nan", "soon"),
    ),
    ("TUTEL_ALLTOALL_ALGO", env.hierarchical_exchange, {None: False, "1D": False, "2d": True}, ("3D",)),
    ("TUTEL_CHECK_RANKS", env.check_ranks, {None: None, "0": False, "1": True}, ("2", "yes")),
    ("TUTEL_CUDA_SANDBOX", env.cuda_sandbox, {None: 0, "2": 2}, ("all",)),
]


@mark.parametrize(("name", "read", "allowed", "refused"), SETTINGS)
def test_settings(monkeypatch, name, read, allowed, refused):
    for text, value in allowed.items():
        monkeypatch.delenv(name, raising=False)
        if text is not None:
            monkeypatch.setenv(name, text)
        assert read() == value
    for text in refused:
        monkeypatch.setenv(name, text)
        with raises(ValueError, match=f"environment variable {name} must be "):
            read()
