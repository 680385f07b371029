"""PyTorch's elastic launcher starts killed processes again, and training goes on with the same losses."""

import re
from pathlib import Path

from programs import run
from ranks import free_port

PROGRAM = Path(__file__).parent / "resumed.py"


def losses(folder: Path, *breaks: str) -> list[tuple[str, str]]:
    place = ["--nproc_per_node=2", "--max_restarts=1", "--monitor_interval=0.1", f"--master_port={free_port()}"]
    command = ["python3", "-m", "torch.distributed.run", *place, PROGRAM, folder, "5", *breaks]
    return re.findall(r"^step (\d+): (\S+)$", run(command, TUTEL_GLOBAL_TIMEOUT_SEC="20"), re.MULTILINE)


def test_a_run_with_a_killed_rank_goes_on_from_its_last_checkpoint(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    wanted = losses(whole)
    assert [step for step, _ in wanted] == list("01234")
    assert losses(broken, "3") == wanted
