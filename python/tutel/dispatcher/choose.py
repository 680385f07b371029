"""Which dispatcher serves a forward pass."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from tutel import env
from tutel.config import ExchangeConfig
from tutel.dispatcher.exchange import ExchangeOptions, FixedDispatcher, RaggedDispatcher
from tutel.dispatcher.gather import GatherDispatcher
from tutel.dispatcher.local import LocalDispatcher
from tutel.distributed.agreement import agree_on
from tutel.distributed.groups import Group, node_size, world_size
from tutel.distributed.wire import Wire
from tutel.experts import ExpertWork
from tutel.route import RoutePlan


class Dispatcher(Protocol):
    """A way to bring tokens to experts and back."""

    def run(self, tokens: Tensor, plan: RoutePlan, work: ExpertWork) -> Tensor:
        """Compute tokens [T, D] to [T, D_out]."""
        ...


_KINDS: dict[str, Callable[[ExchangeOptions], Dispatcher]] = {
    "ragged": RaggedDispatcher,
    "fixed": FixedDispatcher,
    "gather": GatherDispatcher,
}


class Dispatchers:
    """The dispatchers of a layer, made when they are first needed.

    Args:
        group: The layer's ranks.
        shards: Ranks that share an expert.
        weigh_inputs: Whether weights multiply the experts' inputs instead of their outputs.
        exchange: How rows reach other ranks.
    """

    def __init__(self, group: Group, *, shards: int, weigh_inputs: bool, exchange: ExchangeConfig) -> None:
        self.group = group
        self.shards = shards
        self.weigh_inputs = weigh_inputs
        self.exchange = exchange
        self._skip_exchange = env.skip_exchange()
        self._made: dict[tuple[int, int], Dispatcher] = {}

    def choose(self, degree: int, chunks: int) -> Dispatcher:
        """Return the one for a degree of model parallelism and a number of overlapping chunks."""
        key = (degree, chunks)
        if key not in self._made:
            self._made[key] = self._make(degree, chunks)
        return self._made[key]

    def agree(
        self, tokens: Tensor, plan: RoutePlan, degree: int, chunks: int, *, experts: nn.Module, skip_expert: bool
    ) -> None:
        """See to it that all ranks call the layer alike, where ranks compare what they do (on the CPU).

        Raises:
            RankError: On every rank, if one differs.
        """
        exchange, grads = self.exchange, torch.is_grad_enabled()
        settings: dict[str, object] = {
            "exchange": exchange.kind,
            "use_2dh": exchange.hierarchical,
            "wire_dtype": exchange.wire_dtype,
            "adaptive_r": degree,
            "a2a_ffn_overlap_degree": chunks,
            "is_postscore": not self.weigh_inputs,
            "SKIP_A2A": self._skip_exchange,
            "SKIP_EXPERT": skip_expert,
            "the number of experts": plan.num_experts,
            "model_dim": tokens.shape[1],
            "output_dim": getattr(experts, "output_dim", None),
            "the input's dtype": tokens.dtype,
            "whether the input needs a gradient": grads and tokens.requires_grad,
            "whether routing weights need a gradient": grads and plan.topk_weights.requires_grad,
            # Ranks exchange gradients of each: none may leave out what the others wait for.
            "which parameters of the experts need gradients": [
                name for name, parameter in experts.named_parameters() if grads and parameter.requires_grad
            ],
        }
        if exchange.kind == "fixed":
            # Ranks that hold different numbers of tokens agree by inequivalent_tokens=True.
            settings["the capacity (without inequivalent_tokens)"] = plan.largest_need()
        if exchange.kind == "gather":
            settings["top_k"] = plan.topk_ids.shape[1]
        agree_on("forward of a layer", settings, self.group)

    def _make(self, degree: int, chunks: int) -> Dispatcher:
        ranks = world_size(self.group)
        if ranks == 1 or degree == 0:
            return LocalDispatcher(weigh_inputs=self.weigh_inputs)
        node = node_size(self.group) if self.exchange.hierarchical else 1
        options = ExchangeOptions(
            group=self.group,
            shards=self.shards,
            degree=degree,
            chunks=chunks,
            node_size=node if 1 < node < ranks else None,
            wire=Wire(self.exchange.wire_dtype),
            weigh_inputs=self.weigh_inputs,
            skip=self._skip_exchange,
        )
        return _KINDS[self.exchange.kind](options)
