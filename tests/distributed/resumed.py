"""A program that trains a layer over ranks, keeps a checkpoint of every step, and goes on from the last one.

``resumed.py FOLDER STEPS [BREAKS]``: in its first life, rank 1 is killed while it computes step BREAKS.
"""

import os
import signal
import sys
from pathlib import Path

import torch
from torch.distributed import checkpoint as distributed_checkpoint
from tutel.checkpoint import (
    load_sharded_optimizer_state_dict,
    load_sharded_state_dict,
    sharded_optimizer_state_dict,
    sharded_state_dict,
)
from tutel.distributed import reduce_shared_gradients
from tutel.layer import MOELayer

from tutel import net, system


def main(folder: Path, steps: int, breaks: int) -> None:
    session = system.init_data_model_parallel(backend="gloo")
    rank, first_life = session.global_rank, os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    step = 0

    def activation(hidden: torch.Tensor) -> torch.Tensor:
        if step == breaks and rank == 1 and first_life:
            os.kill(os.getpid(), signal.SIGKILL)
        return hidden.tanh()

    torch.set_default_dtype(torch.float64)
    experts = {"type": "ffn", "count_per_node": 2, "hidden_size_per_expert": 8, "activation_fn": activation}
    layer = MOELayer({"type": "top", "k": 2}, 6, experts, seeds=(1, rank + 2, 3))
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)
    torch.manual_seed(40 + rank)
    tokens = torch.randn(10, 6)

    def state() -> dict[str, object]:
        return {"layer": sharded_state_dict(layer), "optimizer": sharded_optimizer_state_dict(layer, optimizer)}

    latest = folder / "latest"
    if latest.exists():
        step = int(latest.read_text())
        read = state()
        distributed_checkpoint.load(read, checkpoint_id=folder / str(step))
        load_sharded_state_dict(layer, read["layer"])
        load_sharded_optimizer_state_dict(layer, optimizer, read["optimizer"])
    for step in range(step, steps):  # noqa: B020  (it goes on where the checkpoint ends)
        optimizer.zero_grad()
        loss = (layer(tokens) - tokens).square().mean()
        loss.backward()
        reduce_shared_gradients(layer)
        optimizer.step()
        total = net.simple_all_reduce(loss.detach())
        distributed_checkpoint.save(state(), checkpoint_id=folder / str(step + 1))
        if rank == 0:
            print(f"step {step}: {total.item()!r}", flush=True)
            unfinished = folder / "latest.unfinished"
            unfinished.write_text(str(step + 1))
            unfinished.replace(latest)
        net.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else -1)
