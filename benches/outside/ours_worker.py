"""Our layer as a worker."""

import torch
from torch import Tensor
from tutel.moe import MOELayer

from benches.outside.protocol import Block, Job, serve
from benches.outside.tensors import DTYPES, load


@torch.no_grad()
def _prepare(job: Job) -> Block:
    torch.set_num_threads(job.threads)
    layer = MOELayer(
        gate_type={"type": "top", "k": job.top_k, "capacity_factor": 0.0},
        model_dim=job.width,
        experts={"type": "llama_ffn", "count_per_node": job.experts, "hidden_size_per_expert": job.hidden},
    ).to(DTYPES[job.dtype])
    layer.get_parameter("gates.0.wg.weight").copy_(load(job, "router", job.experts, job.width))
    for ours, name in (("W_fc1", "gate"), ("W_fc2", "up")):
        layer.get_parameter(f"experts.{ours}").copy_(load(job, name, job.experts, job.hidden, job.width).mT)
    layer.get_parameter("experts.W_fc3").copy_(load(job, "down", job.experts, job.width, job.hidden).mT)
    inputs = load(job, "inputs", job.inputs, job.tokens, job.width)
    last: list[Tensor] = []

    @torch.no_grad()
    def run(index: int) -> None:
        last[:] = [layer(inputs[index])]

    return run, lambda: last[0].float().numpy().tobytes()


if __name__ == "__main__":
    serve(_prepare)
