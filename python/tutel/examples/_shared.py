"""What the examples share: arguments, the tokens they train on, the loop, the lines they print."""

import argparse
import contextlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from tqdm import tqdm
from tutel.distributed.groups import ParallelEnvironment

from tutel import net, system

DTYPES = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}

LEARNING_RATE = 1e-5

#: From a model and its tokens [batch, tokens, D] and labels [batch] to the loss, with gradients and update if training.
Step = Callable[[nn.Module, Optimizer, Tensor, Tensor], Tensor]


def bare_argument_parser(description: str | None) -> argparse.ArgumentParser:
    """Make the command line of a program without a model: how it was launched, and where it computes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--local_rank", "--local-rank", type=int, default=-1, help="set by launchers; -1: from the environment")
    usual = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", choices=["cuda", "cpu"], default=usual, help="where to compute")
    return parser


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    """Make the command line that all examples have."""
    parser = bare_argument_parser(description)
    add = parser.add_argument
    add("--batch_size", type=int, default=16, help="sequences of a step")
    add("--num_tokens", type=int, default=1024, help="tokens of one sequence")
    add("--model_dim", type=int, default=2048, help="width of a token")
    add("--hidden_size", type=int, default=2048, help="hidden units of an expert")
    add("--num_local_experts", default="2", help="experts of a device; -n: n devices share one")
    add("--dtype", choices=list(DTYPES), default="float32", help="of weights and tokens")
    add("--fp32_gate", action="store_true", help="compute the gate in float32 whatever the dtype is")
    add("--top", type=int, default=2, help="experts of a token")
    add("--l_aux_wt", type=float, default=0.0, help="weight of the auxiliary loss")
    add("--num_steps", type=int, default=100, help="steps to run; the last ten are averaged")
    add("--capacity_factor", type=float, default=1.0, help="0: drop nothing; negative: at most that")
    add(
        "--checkpoint_path",
        "--checkpoint",
        metavar="PATTERN",
        help="file that weights are read from if it exists, and written to after training; {rank} and {size} in it are "
        "replaced",
    )
    add("--eval", action="store_true", help="forward only")
    add("--allreduce_degree", type=int, default=1, help="0: leave out the reduction of shared gradients")
    add("--use_tensorcore", action="store_true", help="allow TF32 on GPUs")
    return parser


def add_layer_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``moe_layer`` that are not those of its gate and experts."""
    add = parser.add_argument
    add("--a2a_ffn_overlap_degree", type=int, default=1, help="chunks in which exchange and experts overlap")
    add("--parallel_type", default="adaptive:1", help="data, model, auto or adaptive:r")
    add("--use_2dh", action="store_true", help="exchange inside nodes first, then across")
    add("--megablocks_size", type=int, default=0, help="accepted: rows are never padded here")


#: Arguments that are counts, of any of the programs.
COUNTS = ("batch_size", "num_tokens", "model_dim", "hidden_size", "num_steps", "top", "elements", "num_loops")


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read a command line and check what argparse does not."""
    options = parser.parse_args(arguments)
    for name in COUNTS:
        if getattr(options, name, 1) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device=cuda: torch finds no CUDA device")
    return options


def whole_experts(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    """Return ``--num_local_experts`` for programs whose experts cannot be shared by devices."""
    text = options.num_local_experts
    if not text.isdecimal() or int(text) < 1:
        parser.error(f"--num_local_experts must be an integer of at least 1 here, got {text}")
    return int(text)


def mark_local(_name: str, parameter: nn.Parameter) -> None:
    """Mark an expert's parameter: its gradient is not reduced over the ranks."""
    setattr(parameter, "skip_allreduce", True)  # noqa: B010  (a parameter has no such attribute to mypy)


def log_probabilities(output: Tensor) -> Tensor:
    """Sum outputs [batch, tokens, D] to one logit a token; give their log-softmax [batch, tokens]."""
    return F.log_softmax(torch.sum(output, dim=2), dim=1)


def loss_of(options: argparse.Namespace, model: nn.Module, tokens: Tensor, labels: Tensor) -> Tensor:
    """Compute the loss of a model that gives log-probabilities and the auxiliary loss."""
    output, l_aux = model(tokens)
    loss: Tensor = F.nll_loss(output, labels) + options.l_aux_wt * l_aux
    return loss


def reduce_shared_gradients(options: argparse.Namespace, model: nn.Module) -> None:
    """Sum over the ranks the gradients of the parameters that all ranks share."""
    if options.allreduce_degree == 0:
        return
    for parameter in model.parameters():
        if not hasattr(parameter, "skip_allreduce") and parameter.grad is not None:
            net.simple_all_reduce(parameter.grad, inplace=True)


def plain_step(options: argparse.Namespace) -> Step:
    """Make the usual step: loss, gradients, update."""

    def step(model: nn.Module, optimizer: Optimizer, tokens: Tensor, labels: Tensor) -> Tensor:
        loss = loss_of(options, model, tokens, labels)
        if not options.eval:
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            reduce_shared_gradients(options, model)
            optimizer.step()
        return loss

    return step


def tflops_of_step(options: argparse.Namespace, step_time: float) -> float:
    """Return the rate of one step: two products a layer of an expert, three times as many with their gradients."""
    products = 2 if options.eval else 6
    flops = 2 * products * options.batch_size * options.num_tokens * options.model_dim * options.hidden_size
    kept = options.top * min(abs(options.capacity_factor) or 1.0, 1.0)
    return float(flops * kept / step_time * 1e-12)


def show_setting(options: argparse.Namespace, model: nn.Module) -> None:
    """Print what is measured."""
    session = system.get_local_session()
    local = sum(p.numel() for p in model.parameters() if hasattr(p, "skip_allreduce"))
    shared = sum(p.numel() for p in model.parameters()) - local
    session.dist_print(
        f"[Statistics] param count for MoE local_experts = {local}, param count for MoE gate = {shared}.\n"
    )
    shown = (
        "batch_size num_tokens model_dim hidden_size num_local_experts top dtype capacity_factor "
        "a2a_ffn_overlap_degree parallel_type device"
    )
    settings = ", ".join(f"{name} = {getattr(options, name)}" for name in shown.split() if hasattr(options, name))
    session.dist_print(f"[Benchmark] world_size = {session.global_size}, {settings}")


def sgd(model: nn.Module) -> Optimizer:
    """Make the usual optimizer."""
    return torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)


def train(
    options: argparse.Namespace,
    model: nn.Module,
    optimizer: Optimizer,
    tokens: Tensor,
    labels: Tensor,
    step: Step,
    remark: Callable[[], str],
) -> list[float]:
    """Run all steps; return their times in seconds."""
    session = system.get_local_session()
    step_times = []
    # A bar on a terminal only: piped output keeps plain lines.
    with tqdm(total=options.num_steps, unit="step", disable=not sys.stderr.isatty(), leave=False) as bar:
        for number in range(options.num_steps):
            start = system.record_time()
            tokens.grad = None
            with torch.no_grad() if options.eval else contextlib.nullcontext():
                loss = step(model, optimizer, tokens, labels)
            step_times.append(system.record_time() - start)
            if session.global_rank == 0:
                tflops = tflops_of_step(options, step_times[-1])
                tqdm.write(
                    f"STEP-{number}: DONE, loss = {loss.item()!r}, step_time = {step_times[-1]:.6f} sec, "
                    f"perf = {tflops:.2f} tflops.{remark()}",
                    file=sys.stdout,
                )
            bar.update()
    return step_times


class Checkpoint:
    """The file of ``--checkpoint_path``, or none."""

    def __init__(self, pattern: str | None) -> None:
        session = system.get_local_session()
        self.print = session.dist_print
        self.path = (
            Path(system.apply_rank_size_from_pattern(pattern, session.global_rank, session.global_size))
            if pattern
            else None
        )

    def read(self, model: nn.Module, device: torch.device) -> None:
        """Read the weights if the file exists."""
        if self.path is None:
            return
        if self.path.exists():
            model.load_state_dict(torch.load(self.path, map_location=device, weights_only=True))
            self.print(f"[Checkpoint] weights read from {self.path}")
        else:
            self.print(f"[Checkpoint] {self.path} does not exist: the weights are new")

    def write(self, model: nn.Module) -> None:
        """Write the weights; the file is the old one or the new one at any time."""
        if self.path is None:
            return
        unfinished = self.path.with_name(f"{self.path.name}.unfinished")
        torch.save(model.state_dict(), unfinished)
        unfinished.replace(self.path)
        self.print(f"[Checkpoint] weights written to {self.path}")


def start(options: argparse.Namespace, group_count: int = 1) -> tuple[ParallelEnvironment, torch.device]:
    """Join the other processes; give this one's place among them, and its device."""
    session = system.init_data_model_parallel(group_count, backend="nccl" if options.device == "cuda" else "gloo")
    # The old launcher gives the rank as an argument.
    if session.is_cuda and options.local_rank >= 0:
        return session, torch.device("cuda", options.local_rank)
    return session, session.local_device


def check(what: str, found: Tensor, expected: Tensor) -> None:
    """Compare what a collective gave with what it must give.

    Raises:
        RuntimeError: If they differ.
    """
    if not torch.equal(found, expected):
        rank = system.get_local_session().global_rank
        raise RuntimeError(f"rank {rank} received wrong {what}: {found.tolist()} instead of {expected.tolist()}")


def run(
    options: argparse.Namespace,
    make_model: Callable[[argparse.Namespace], nn.Module],
    *,
    step: Step | None = None,
    wrap: Callable[[nn.Module], nn.Module] = lambda model: model,
    make_optimizer: Callable[[nn.Module], Optimizer] = sgd,
    remark: Callable[[nn.Module], str] = lambda _model: "",
    group_count: int = 1,
) -> None:
    """Run an example.

    Args:
        options: Its command line.
        make_model: Gives the model, from tokens [batch, tokens, D] to log-probabilities and auxiliary loss.
        step: One step, :func:`plain_step` if None.
        wrap: Gives what is trained, from the model with its first weights.
        make_optimizer: Gives the optimizer of what is trained.
        remark: Gives what stands at the end of a step's line.
        group_count: How many groups of neighbouring ranks hold a model each.
    """
    dtype = DTYPES[options.dtype]
    torch.set_default_dtype(dtype)
    torch.backends.cuda.matmul.allow_tf32 = options.use_tensorcore
    session, device = start(options, group_count)

    model = make_model(options).to(device)
    checkpoint = Checkpoint(options.checkpoint_path)
    checkpoint.read(model, device)
    show_setting(options, model)
    trained = wrap(model)

    torch.manual_seed(0)
    shape = [options.batch_size, options.num_tokens, options.model_dim]
    # Drawn on the CPU in fp32, so that every dtype and device computes on the same values.
    tokens = torch.randn(shape, dtype=torch.float32, device="cpu").to(device, dtype).requires_grad_(not options.eval)
    labels = torch.empty(options.batch_size, dtype=torch.int64, device="cpu").random_(1).to(device)

    optimizer = make_optimizer(trained)
    step_times = train(options, trained, optimizer, tokens, labels, step or plain_step(options), lambda: remark(model))
    if not options.eval:
        checkpoint.write(model)
    last = step_times[-10:]
    session.dist_print(f"\n[Summary] Average synchronized step_time = {sum(last) / len(last)} sec.")
