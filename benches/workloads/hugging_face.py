"""The sparse blocks of Mixtral and Qwen3 as the transformers library has them, against our layer with their weights.

Both route alike: softmax over all experts, the top k of it, divided by their sum. The logits are computed in the
input's dtype on both sides, so tokens are drawn whose choice no rounding can change.
"""

import copy
import importlib.util
import itertools
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tutel.moe import MOELayer

from benches.workload import SHORT_NAMES, Case, Results, Side, Workload
from benches.workloads.layer_work import experts_touched, forward_work, step_work, without_ties

#: What stands here is skipped above so many rows: batched_mm gathers a copy of an expert's weights for each row.
_MOST_ROWS = {"batched_mm": 128}
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
WIDTH = 1024


@dataclass(frozen=True)
class Block:
    """A block's sizes, with a hidden state of 1024."""

    name: str
    experts: int
    hidden: int
    top_k: int

    def theirs(self, dtype: torch.dtype) -> nn.Module:
        """Make the library's block with random weights."""
        if self.name == "mixtral":
            from transformers.models.mixtral.configuration_mixtral import MixtralConfig
            from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

            block: nn.Module = MixtralSparseMoeBlock(  # type: ignore[no-untyped-call]
                MixtralConfig(
                    hidden_size=WIDTH,
                    intermediate_size=self.hidden,
                    num_local_experts=self.experts,
                    num_experts_per_tok=self.top_k,
                )
            )
        else:
            from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
            from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

            block = Qwen3MoeSparseMoeBlock(
                Qwen3MoeConfig(
                    hidden_size=WIDTH,
                    moe_intermediate_size=self.hidden,
                    num_experts=self.experts,
                    num_experts_per_tok=self.top_k,
                    norm_topk_prob=True,
                )
            )
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            # Logits and outputs of about 1: what training makes of the usual 0.02 is not our subject.
            for parameter in block.parameters():
                parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
        return block.to(dtype)

    def ours(self, block: nn.Module) -> MOELayer:
        """Make our layer with the weights of theirs, in our layout: [E, in, out] instead of [E, out, in]."""
        router = block.get_parameter("gate.weight")
        layer = MOELayer(
            gate_type={"type": "top", "k": self.top_k, "capacity_factor": 0.0},
            model_dim=WIDTH,
            experts={"type": "llama_ffn", "count_per_node": self.experts, "hidden_size_per_expert": self.hidden},
        ).to(router.dtype)
        gate_up, down = (block.get_parameter(f"experts.{name}_proj").detach() for name in ("gate_up", "down"))
        gate, up = gate_up.chunk(2, dim=1)
        with torch.no_grad():
            layer.get_parameter("gates.0.wg.weight").copy_(router)
            for name, weight in (("W_fc1", gate), ("W_fc2", up), ("W_fc3", down)):
                layer.get_parameter(f"experts.{name}").copy_(weight.transpose(1, 2))
        return layer

    def inputs(self, block: nn.Module, tokens: int, count: int) -> list[Tensor]:
        """Draw inputs [1, T, D]."""
        router = block.get_parameter("gate.weight").detach()
        drawn = torch.randn(3 * tokens * count + 64, WIDTH, generator=torch.Generator().manual_seed(1)).to(router.dtype)
        kept = without_ties(drawn, drawn @ router.T, self.top_k, tokens * count)
        return list(kept.view(count, 1, tokens, WIDTH).unbind())


BLOCKS = (Block("mixtral", experts=8, hidden=3584, top_k=2), Block("qwen3", experts=128, hidden=384, top_k=8))


def with_implementation(block: nn.Module, implementation: str) -> nn.Module:
    """Return the block with another way to compute its experts, on the same parameters."""
    shared: dict[int, Any] = {id(parameter): parameter for parameter in block.parameters()}
    other = copy.deepcopy(block, shared)
    other.get_submodule("experts").config._experts_implementation = implementation  # type: ignore[union-attr]
    return other


def _blocks(block: nn.Module, rows: int) -> dict[str, nn.Module]:
    return {
        f"transformers {name}": with_implementation(block, name)
        for name in IMPLEMENTATIONS
        if rows <= _MOST_ROWS.get(name, rows)
    }


def _forward_side(name: str, layer: nn.Module, inputs: list[Tensor]) -> Side:
    turns = itertools.cycle(inputs)

    @torch.no_grad()
    def run() -> Results:
        return (layer(next(turns)),)

    return Side(name, run)


def _forward(sizes: Block, tokens: int, dtype: torch.dtype) -> Case:
    block = sizes.theirs(dtype)
    layer = sizes.ours(block)
    # Inputs in turn take other experts each: their weights come from memory, as in a model of many layers.
    inputs = sizes.inputs(block, tokens, count={1: 16, 8: 4}.get(tokens, 1))
    work = forward_work(
        dtype,
        tokens=tokens,
        top_k=sizes.top_k,
        width=WIDTH,
        hidden=sizes.hidden,
        matrices=3,
        touched=experts_touched(layer, inputs),
    )
    peers = [_forward_side(name, peer, inputs) for name, peer in _blocks(block, tokens * sizes.top_k).items()]
    return Case(_forward_side("tutel", layer, inputs), peers, work, len(inputs))


def training_step(layer: nn.Module, given: Tensor) -> Results:
    """Run forward and backward; return output and gradients: input's, router's, the first expert's last matrix's."""
    tokens = given.detach().requires_grad_()
    for parameter in layer.parameters():
        parameter.grad = None
    output = layer(tokens)
    output.backward(torch.ones_like(output))
    gate, down = "gates.0.wg.weight", "experts.W_fc3"
    if not isinstance(layer, MOELayer):
        gate, down = "gate.weight", "experts.down_proj"
    grads = [tokens.grad, layer.get_parameter(gate).grad, layer.get_parameter(down).grad]
    found = [grad for grad in grads if grad is not None]
    if not isinstance(layer, MOELayer):
        found[-1] = found[-1].transpose(1, 2)
    return [output.detach(), *found[:2], found[2][0]]


def _train(sizes: Block, tokens: int, dtype: torch.dtype) -> Case:
    block = sizes.theirs(dtype)
    layer = sizes.ours(block)
    inputs = sizes.inputs(block, tokens, count=1)
    work = step_work(
        dtype,
        tokens=tokens,
        top_k=sizes.top_k,
        width=WIDTH,
        hidden=sizes.hidden,
        experts=sizes.experts,
        matrices=3,
        touched=experts_touched(layer, inputs),
    )
    sides = {"tutel": layer, **_blocks(block, tokens * sizes.top_k)}
    ours, *peers = (Side(name, partial(training_step, side, inputs[0])) for name, side in sides.items())
    return Case(ours, peers, work)


def _workloads() -> list[Workload]:
    if importlib.util.find_spec("transformers") is None:
        return []
    made = []
    for block in BLOCKS:
        for kind, build, token_counts in (("forward", _forward, (2048, 8, 1)), ("train", _train, (2048,))):
            for tokens in token_counts:
                for dtype in (torch.float32, torch.bfloat16):
                    name = f"hf.{kind}.{SHORT_NAMES[dtype]}.{block.name}_T{tokens}"
                    made.append(Workload(name, dtype, partial(build, block, tokens, dtype)))
    return made


WORKLOADS = _workloads()
