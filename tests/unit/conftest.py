"""What tests of start-up share."""

from pytest import fixture

from tutel import system

LAUNCHERS = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "NUMA_TYPE"),
    *(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
    *("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS", "MASTER_ADDR", "MASTER_PORT"),
    *(f"SLURM_{name}" for name in ("PROCID", "NTASKS", "LOCALID", "NODEID", "JOB_ID", "STEP_ID", "NNODES", "NODELIST")),
    *("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE", "SLURM_STEP_NUM_NODES", "SLURM_STEP_NODELIST"),
    *("TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_USE_AGENT_STORE"),
)


@fixture
def no_launcher_and_no_session(monkeypatch):
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    start = system.init_data_model_parallel
    before = dict(vars(start))
    vars(start).clear()
    yield
    vars(start).clear()
    vars(start).update(before)
    system.cache().reset()
