"""vLLM's fused block for CPUs as a worker: its operators alone, without the server around them."""

import importlib.util
from pathlib import Path

import torch

from benches.outside.protocol import Block, Job, serve
from benches.outside.tensors import load


def _load_operators() -> None:
    """Load the library that vLLM would choose for this processor; its Python package needs much else."""
    found = importlib.util.find_spec("vllm")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("vllm is not installed")
    # The same choice as in vLLM's own start.
    if not torch.cpu._is_avx512_supported():
        name = "_C_AVX2"
    else:
        name = "_C" if torch.cpu._is_avx512_bf16_supported() else "_C_AVX512"
    libraries = sorted(Path(found.origin).parent.glob(f"{name}.*so"))
    if not libraries:
        raise ModuleNotFoundError(f"vllm has no library {name}: it was not built for CPUs")
    torch.ops.load_library(str(libraries[0]))  # type: ignore[no-untyped-call]


@torch.no_grad()
def _prepare(job: Job) -> Block:
    _load_operators()
    torch.set_num_threads(job.threads)
    operators = torch.ops._C
    instructions = "amx" if torch.cpu._is_amx_tile_supported() else "vec"

    def packed(weight: torch.Tensor) -> torch.Tensor:
        made = torch.empty_like(weight)
        operators.prepack_moe_weight(weight, made, instructions)
        return made

    router = load(job, "router", job.experts, job.width)
    gate, up = (load(job, name, job.experts, job.hidden, job.width) for name in ("gate", "up"))
    gate_up = packed(torch.cat([gate, up], dim=1))
    down = packed(load(job, "down", job.experts, job.width, job.hidden))
    inputs = load(job, "inputs", job.inputs, job.tokens, job.width)
    output = torch.empty(job.tokens, job.width, dtype=inputs.dtype)

    @torch.no_grad()
    def run(index: int) -> None:
        # The top k of the logits and their softmax: the same as dividing the top scores by their sum.
        values, ids = torch.topk(inputs[index] @ router.T, job.top_k, dim=-1, sorted=False)
        weights = torch.softmax(values, dim=-1, dtype=torch.float32)
        operators.cpu_fused_moe(
            output, inputs[index], gate_up, down, None, None, weights, ids.int(), False, "silu", instructions
        )

    return run, lambda: output.float().numpy().tobytes()


if __name__ == "__main__":
    serve(_prepare)
