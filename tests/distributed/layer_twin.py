"""A layer over several ranks beside the same layer on one: what both share, and how they are compared.

The twin holds all experts on one rank. Each rank computes its own tokens by it: outputs, losses and gradients of tokens
and gate are the same; gradients of experts are the same once they are summed over the ranks.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from tutel.layer import MOELayer

from tutel import net

MODEL_DIM = 6
HIDDEN = 12


@dataclasses.dataclass(frozen=True)
class Case:
    """One way to call a layer.

    Attributes:
        experts_per_rank: e, or -n where n ranks share one.
        layer: Further options of the layer.
        gate: Further options of its gate.
        experts: Further options of its experts.
        forward: Options of the call.
        tokens: T of each rank.
        skewed: Whether all tokens choose the first expert first.
        dtype: Of weights and tokens.
        tolerance: Of outputs and gradients, relative to the largest.
    """

    experts_per_rank: int = 2
    layer: dict[str, Any] = dataclasses.field(default_factory=dict)
    gate: dict[str, Any] = dataclasses.field(default_factory=dict)
    experts: dict[str, Any] = dataclasses.field(default_factory=dict)
    forward: dict[str, Any] = dataclasses.field(default_factory=dict)
    tokens: tuple[int, ...] = (7, 7, 7, 7)
    skewed: bool = False
    dtype: torch.dtype = torch.float64
    tolerance: float = 1e-12


def check(case: Case, group: Any = None) -> None:
    """Compare on this rank; every rank of the group calls it."""
    ranks, rank = net.get_world_size(group), net.get_world_rank(group)
    layer, twin = make_pair(case, group)
    torch.manual_seed(100 + rank)
    tokens = torch.randn(case.tokens[rank], MODEL_DIM, dtype=case.dtype)
    outputs = [compute(module, case, tokens, extra) for module, extra in ((layer, case.forward), (twin, _local(case)))]
    (output, inputs, l_aux), (wanted, wanted_inputs, wanted_l_aux) = outputs
    close(case, "output", output, wanted)
    close(case, "l_aux", l_aux, wanted_l_aux)
    close(case, "gradient of the input", inputs, wanted_inputs)
    for name, parameter in twin.gates.named_parameters():
        close(case, f"gradient of {name}", dict(layer.gates.named_parameters())[name].grad, parameter.grad)
    for name, parameter in twin.experts.named_parameters():
        summed = net.simple_all_reduce(parameter.grad, group)
        mine = dict(layer.experts.named_parameters())[name]
        part = part_of(name, summed, rank, ranks, layer, mine)
        close(case, f"gradient of {name}", mine.grad, part)


def make_pair(case: Case, group: Any = None) -> tuple[MOELayer, MOELayer]:
    """Make the layer of this rank and its twin, with equal weights."""
    ranks, rank = net.get_world_size(group), net.get_world_rank(group)
    local = case.experts_per_rank
    total = local * ranks if local > 0 else ranks // -local
    kind = {"type": "ffn", "hidden_size_per_expert": HIDDEN, "activation_fn": torch.nn.functional.silu, **case.experts}
    if kind["type"] == "custom":
        kind = case.experts
    gate = {"type": "top", "k": 2, "capacity_factor": 0.0, **case.gate}
    default = torch.get_default_dtype()
    torch.set_default_dtype(case.dtype)
    try:
        twin = MOELayer(
            gate,
            MODEL_DIM,
            {**kind, "count_per_node": total},
            group=net.create_standalone_group(),
            seeds=(1, 2, 3),
            is_postscore=case.layer.get("is_postscore", True),
        )
        layer = MOELayer(gate, MODEL_DIM, {**kind, "count_per_node": local}, group=group, seeds=(1, 2, 3), **case.layer)
    finally:
        torch.set_default_dtype(default)
    if case.skewed:
        with torch.no_grad():
            twin.gates[0].wg.weight[0] += 40 * twin.gates[0].wg.weight.abs().sum()
    layer.gates.load_state_dict(twin.gates.state_dict())
    with torch.no_grad():
        for name, parameter in layer.experts.named_parameters():
            whole = dict(twin.experts.named_parameters())[name]
            parameter.copy_(part_of(name, whole, rank, ranks, layer, parameter))
    return layer, twin


def part_of(name: str, whole: Tensor, rank: int, ranks: int, layer: MOELayer, like: Tensor) -> Tensor:
    """Return what a rank holds of a tensor of all experts."""
    shards = layer.sharded_count
    if shards == 1:
        return whole.chunk(ranks)[rank]
    own = whole[rank // shards : rank // shards + 1]
    part = rank % shards
    if name.endswith("fc2_bias"):
        width = like.shape[1]
        return nn.functional.pad(own, (0, width * shards - own.shape[1]))[:, part * width : (part + 1) * width]
    dim = 2 if name in ("W_fc1", "W_fc2") else 1
    copies = layer.experts.config.fc1_copies if name.startswith("batched_fc1") else 1
    if copies > 1:
        return torch.cat([half.chunk(shards, dim)[part] for half in own.chunk(copies, dim)], dim)
    return own.chunk(shards, dim)[part]


def compute(layer: MOELayer, case: Case, tokens: Tensor, forward: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Run forward and backward; return output, the input's gradient and the auxiliary loss."""
    given = tokens.abs().requires_grad_() if case.skewed else tokens.clone().requires_grad_()
    layer.zero_grad()
    output = layer(given, **forward)
    weights = torch.linspace(-1, 1, max(output.numel(), 1), dtype=case.dtype)[: output.numel()].view(output.shape)
    ((output * weights).sum() + 0.1 * output.l_aux).backward()
    return output.detach(), given.grad, output.l_aux.detach()


def close(case: Case, what: str, found: Tensor | None, wanted: Tensor | None) -> None:
    assert (found is None) == (wanted is None), what
    if found is None or wanted is None:
        return
    assert found.shape == wanted.shape, (what, found.shape, wanted.shape)
    largest = float(wanted.abs().max()) if wanted.numel() else 0.0
    difference = float((found - wanted).abs().max()) if wanted.numel() else 0.0
    assert difference <= case.tolerance * max(largest, 1e-3), f"{what}: off by {difference} of {largest} in {case}"


def _local(case: Case) -> dict[str, Any]:
    """Return the options that one rank has too; the capacity counts the ranks' largest number of tokens."""
    return {name: value for name, value in case.forward.items() if name in ("capacity_factor", "top_k")}
