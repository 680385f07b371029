"""Train one Mixture-of-Experts layer on random tokens: ``python3 -m tutel.examples.helloworld``."""

import argparse
import contextlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from tutel import env
from tutel import moe as tutel_moe

DTYPES = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--local_rank", "--local-rank", type=int, default=-1, help="set by launchers; -1: from the environment")
    add("--batch_size", type=int, default=16)
    add("--num_tokens", type=int, default=1024, help="tokens of one sequence")
    add("--model_dim", type=int, default=2048)
    add("--hidden_size", type=int, default=2048, help="hidden units of an expert")
    add("--num_local_experts", default="2", help="experts of a device; -n: n devices share one")
    add("--dtype", choices=list(DTYPES), default="float32")
    add("--fp32_gate", action="store_true", help="compute the gate in float32 whatever the dtype is")
    add("--top", type=int, default=2, help="experts of a token")
    add("--l_aux_wt", type=float, default=0.0, help="weight of the auxiliary loss")
    add("--a2a_ffn_overlap_degree", type=int, default=1)
    add("--num_steps", type=int, default=100)
    add("--capacity_factor", type=float, default=1.0, help="0: drop nothing; negative: at most that")
    add("--parallel_type", default="adaptive:1")
    add("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    add("--checkpoint_path", "--checkpoint", help="file that the weights are read from if it exists, and written to")
    add("--eval", action="store_true", help="forward only")
    add("--use_2dh", action="store_true")
    add("--megablocks_size", type=int, default=0)
    add("--allreduce_degree", type=int, default=1, help="0: leave out the reduction of shared gradients")
    add("--use_tensorcore", action="store_true", help="allow TF32 on GPUs")
    add("--expert_type", choices=["ffn"], default="ffn")
    options = parser.parse_args(arguments)
    for name in ("batch_size", "num_tokens", "model_dim", "hidden_size", "num_steps", "top"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    return options


class ExampleModel(nn.Module):
    """A Mixture-of-Experts layer whose outputs are summed to one logit a token."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__()
        self.megablocks_size = options.megablocks_size
        self._moe_layer = tutel_moe.moe_layer(
            gate_type={
                "type": "top",
                "k": options.top,
                "fp32_gate": options.fp32_gate,
                "capacity_factor": options.capacity_factor,
            },
            model_dim=options.model_dim,
            experts={
                "type": options.expert_type,
                "count_per_node": options.num_local_experts,
                "hidden_size_per_expert": options.hidden_size,
                "activation_fn": F.relu,
            },
            scan_expert_func=lambda _name, parameter: setattr(parameter, "skip_allreduce", True),
            seeds=(1, 1, 1),
            a2a_ffn_overlap_degree=options.a2a_ffn_overlap_degree,
            parallel_type=options.parallel_type,
            use_2dh=options.use_2dh,
        )

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Give log-probabilities [batch, tokens] of tokens [batch, tokens, D], and the auxiliary loss."""
        output = self._moe_layer(tokens, megablocks_size=self.megablocks_size)
        return F.log_softmax(torch.sum(output, dim=2), dim=1), output.l_aux


def tflops_of_step(options: argparse.Namespace, step_time: float) -> float:
    """Return the rate of one step: two products a layer of an expert, three times as many with their gradients."""
    products = 2 if options.eval else 6
    flops = 2 * products * options.batch_size * options.num_tokens * options.model_dim * options.hidden_size
    kept = options.top * min(abs(options.capacity_factor) or 1.0, 1.0)
    return float(flops * kept / step_time * 1e-12)


def show_setting(options: argparse.Namespace, model: nn.Module) -> None:
    """Print what is measured."""
    local = sum(p.numel() for p in model.parameters() if hasattr(p, "skip_allreduce"))
    shared = sum(p.numel() for p in model.parameters()) - local
    print(f"[Statistics] param count for MoE local_experts = {local}, param count for MoE gate = {shared}.\n")
    shown = (
        "batch_size num_tokens model_dim hidden_size num_local_experts top dtype capacity_factor "
        "a2a_ffn_overlap_degree parallel_type device"
    )
    settings = ", ".join(f"{name} = {getattr(options, name)}" for name in shown.split())
    print(f"[Benchmark] world_size = 1, {settings}")


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def train(options: argparse.Namespace, model: nn.Module, tokens: Tensor, labels: Tensor) -> list[float]:
    """Run all steps; return their times in seconds."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)
    step_times = []
    # A bar on a terminal only: piped output keeps plain lines.
    with tqdm(total=options.num_steps, unit="step", disable=not sys.stderr.isatty(), leave=False) as bar:
        for step in range(options.num_steps):
            synchronize(tokens.device)
            start = time.perf_counter()
            with torch.no_grad() if options.eval else contextlib.nullcontext():
                output, l_aux = model(tokens)
                loss = F.nll_loss(output, labels) + options.l_aux_wt * l_aux
            if not options.eval:
                optimizer.zero_grad()
                tokens.grad = None
                loss.backward()
                optimizer.step()
            synchronize(tokens.device)
            step_times.append(time.perf_counter() - start)
            tflops = tflops_of_step(options, step_times[-1])
            tqdm.write(
                f"STEP-{step}: DONE, loss = {loss.item()!r}, step_time = {step_times[-1]:.6f} sec, "
                f"perf = {tflops:.2f} tflops.",
                file=sys.stdout,
            )
            bar.update()
    return step_times


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program."""
    options = parse_arguments(arguments)
    dtype = DTYPES[options.dtype]
    torch.set_default_dtype(dtype)
    torch.backends.cuda.matmul.allow_tf32 = options.use_tensorcore
    local_rank = env.local_rank() if options.local_rank < 0 else options.local_rank
    device = torch.device("cuda", local_rank) if options.device == "cuda" else torch.device("cpu")

    model = ExampleModel(options).to(device)
    checkpoint = Path(options.checkpoint_path) if options.checkpoint_path else None
    if checkpoint is not None and checkpoint.exists():
        model.load_state_dict(torch.load(checkpoint, map_location=device))
        print(f"[Checkpoint] weights read from {checkpoint}")
    show_setting(options, model)

    torch.manual_seed(0)
    shape = [options.batch_size, options.num_tokens, options.model_dim]
    # Drawn on the CPU in fp32, so that every dtype and device computes on the same values.
    tokens = torch.randn(shape, dtype=torch.float32, device="cpu").to(device, dtype).requires_grad_(not options.eval)
    labels = torch.empty(options.batch_size, dtype=torch.int64, device="cpu").random_(1).to(device)

    step_times = train(options, model, tokens, labels)
    if checkpoint is not None and not options.eval:
        torch.save(model.state_dict(), checkpoint)
        print(f"[Checkpoint] weights written to {checkpoint}")
    last = step_times[-10:]
    print(f"\n[Summary] Average synchronized step_time = {sum(last) / len(last)} sec.")


if __name__ == "__main__":
    main()
