"""``python -m benches.distributed.soak``: thousands of training steps over four ranks beside the same steps on one.

Every step draws anew how many tokens each rank has (none, too), and the mode, the number of overlapping chunks and the
kind of exchange. A rank's outputs have to be those of the twin, a model that holds all experts on one rank and sees all
ranks' tokens; parameters are trained on both sides, so that a difference, once there, would grow. At the end memory has
to be what it was after the first tenth.
"""

import argparse
import gc
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benches.distributed.ranks import RanksError, run_ranks
from tutel import moe, net

RANKS = 4
MODEL_DIM, HIDDEN = 12, 16
#: Layers one behind the other: e experts a rank, or -n where n ranks share one.
EXPERTS = (2, -2, -4)
MOST_TOKENS = 24
RATE = 1e-3
#: Largest difference that is allowed, of outputs of about 1.
DRIFT = 1e-10
#: Growth of resident memory that is allowed, in bytes: allocators settle.
GROWTH = 16 << 20


@dataclass(frozen=True)
class Verdict:
    """What a rank saw: the largest differences, and resident memory in bytes after a tenth and at the end."""

    output: float
    l_aux: float
    parameters: float
    resident: tuple[int, int]
    switches: int
    tokens: int
    seconds: float

    @property
    def failures(self) -> list[str]:
        """Return what was not as it has to be."""
        found = [
            f"{name} differ by {value:.1e}, allowed is {DRIFT:.0e}"
            for name, value in [("outputs", self.output), ("losses", self.l_aux), ("parameters", self.parameters)]
            if not value <= DRIFT
        ]
        growth = self.resident[1] - self.resident[0]
        if growth > GROWTH:
            found.append(f"resident memory grew by {growth >> 20} MiB, allowed is {GROWTH >> 20} MiB")
        return found


class Pair:
    """A layer over all ranks and its twin on this one, with equal weights."""

    def __init__(self, experts: int, seed: int) -> None:
        rank, ranks = net.get_world_rank(), net.get_world_size()
        self.shards = max(1, -experts)
        total = experts * ranks if experts > 0 else ranks // self.shards
        self.layer = _layer(experts, None, total, seed)
        self.twin = _layer(total, net.create_standalone_group(), total, seed)
        self.layer.gates.load_state_dict(self.twin.gates.state_dict())
        self.parts = {name: _Part(name, rank, ranks, self.shards) for name, _ in self.layer.experts.named_parameters()}
        with torch.no_grad():
            for name, parameter in self.layer.experts.named_parameters():
                parameter.copy_(self.parts[name].of(dict(self.twin.experts.named_parameters())[name]))

    def train(self) -> None:
        """Step both by their gradients."""
        with torch.no_grad():
            for parameter in self.layer.gates.parameters():
                net.simple_all_reduce(parameter.grad, inplace=True)
            for module in (self.layer, self.twin):
                for parameter in module.parameters():
                    parameter -= RATE * parameter.grad
                    parameter.grad = None

    def difference(self) -> float:
        """Return the largest difference of parameters."""
        whole = dict(self.twin.experts.named_parameters())
        pairs = [(mine, self.parts[name].of(whole[name])) for name, mine in self.layer.experts.named_parameters()]
        pairs += list(zip(self.layer.gates.parameters(), self.twin.gates.parameters(), strict=True))
        return max(_largest(mine - other) for mine, other in pairs)


@dataclass(frozen=True)
class _Part:
    """Which part of a parameter of all experts a rank holds."""

    name: str
    rank: int
    ranks: int
    shards: int

    def of(self, whole: Tensor) -> Tensor:
        if self.shards == 1:
            return whole.chunk(self.ranks)[self.rank]
        own = whole[self.rank // self.shards].unsqueeze(0)
        return own.chunk(self.shards, dim=1)[self.rank % self.shards]


def _layer(experts: int, group: Any, total: int, seed: int) -> moe.moe_layer:
    return moe.moe_layer(
        {"type": "top", "k": min(2, total), "capacity_factor": 0.0},
        MODEL_DIM,
        {
            "type": "ffn",
            "hidden_size_per_expert": HIDDEN,
            "count_per_node": experts,
            "activation_fn": nn.functional.silu,
        },
        group=group,
        seeds=(seed, seed, seed),
    )


def soak(steps: int, seed: int) -> Verdict:
    """Run the steps on this rank; all four ranks call this."""
    torch.set_default_dtype(torch.float64)
    pairs = [Pair(experts, index) for index, experts in enumerate(EXPERTS)]
    draw = random.Random(seed)  # the same on every rank
    rank, started = net.get_world_rank(), time.monotonic()
    output_difference = l_aux_difference = parameter_difference = 0.0
    resident, switches, seen = _resident(), 0, 0
    modes: list[int] = []
    for number in tqdm(range(steps), disable=rank != 0, unit="step", mininterval=2.0):
        counts = [draw.choice((0, draw.randrange(1, MOST_TOKENS))) for _ in range(RANKS)]
        before, modes = modes, [draw.choice(pair.layer.valid_rs) for pair in pairs]
        switches += sum(a != b for a, b in zip(before, modes, strict=False))
        options = [{"adaptive_r": r, "a2a_ffn_overlap_degree": draw.choice((1, 1, 2, 3))} for r in modes]
        found = _step(pairs, counts, options, rank, seed + number)
        output_difference, l_aux_difference = max(output_difference, found[0]), max(l_aux_difference, found[1])
        seen += counts[rank]
        if number % 50 == 49 or number == steps - 1:
            parameter_difference = max(parameter_difference, *(pair.difference() for pair in pairs))
        if number == steps // 10:
            gc.collect()
            resident = _resident()
    gc.collect()
    return Verdict(
        output_difference,
        l_aux_difference,
        parameter_difference,
        (resident, _resident()),
        switches,
        seen,
        time.monotonic() - started,
    )


def _step(
    pairs: list[Pair], counts: list[int], options: list[dict[str, int]], rank: int, seed: int
) -> tuple[float, float]:
    """Train both models by one batch; return the largest differences of this rank's outputs and losses."""
    torch.manual_seed(seed)
    batch = torch.randn(sum(counts), MODEL_DIM)
    goal = torch.randn(sum(counts), MODEL_DIM)
    first = sum(counts[:rank])
    own = slice(first, first + counts[rank])
    # The losses of several ranks are not that of their joined batch: the twin's are those of each rank by itself.
    mine, losses = _forward([pair.layer for pair in pairs], batch[own], options)
    ((mine * goal[own]).sum()).backward()
    with torch.no_grad():
        _, expected_losses = _forward([pair.twin for pair in pairs], batch[own], [{}] * len(pairs))
    whole, _ = _forward([pair.twin for pair in pairs], batch, [{}] * len(pairs))
    (whole * goal).sum().backward()
    for pair in pairs:
        pair.train()
    loss_difference = max(abs(float(a) - float(b)) for a, b in zip(losses, expected_losses, strict=True))
    return _largest(mine - whole[own]), loss_difference


def _forward(layers: list[Any], tokens: Tensor, options: list[dict[str, int]]) -> tuple[Tensor, list[Tensor]]:
    losses = []
    for layer, chosen in zip(layers, options, strict=True):
        # A rest beside the layer, as models have it: outputs neither die out nor explode.
        output = layer(tokens, inequivalent_tokens=True, **chosen)
        losses.append(output.l_aux.detach())
        tokens = tokens + output
    return tokens, losses


def _largest(values: Tensor) -> float:
    return float(values.detach().abs().max()) if values.numel() else 0.0


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program: 0 if nothing drifted and memory stayed flat, else 1."""
    parser = argparse.ArgumentParser(prog="python -m benches.distributed.soak", description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=2000, help="training steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of sizes, modes and tokens (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error(f"--steps must be at least 1, got {options.steps}")
    try:
        verdicts = run_ranks(soak, RANKS, options.steps, options.seed, timeout=60 + options.steps)
    except RanksError as error:
        print(f"FAILED: {error}", file=sys.stderr)
        return 1
    for rank, verdict in enumerate(verdicts):
        before, after = (size >> 20 for size in verdict.resident)
        print(
            f"rank {rank}: {verdict.tokens} tokens, differences: outputs {verdict.output:.1e}, losses "
            f"{verdict.l_aux:.1e}, parameters {verdict.parameters:.1e}; resident {before} to {after} MiB"
        )
    failures = [f"rank {rank}: {text}" for rank, verdict in enumerate(verdicts) for text in verdict.failures]
    print("\n".join(failures) if failures else f"OK: {options.steps} steps, {verdicts[0].switches} switches of modes, "
          f"{verdicts[0].seconds:.0f} s")  # fmt: skip
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
