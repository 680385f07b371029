"""All ranks' tokens go to every rank, which computes the choices of its own experts; outputs are summed at home.

For few tokens: as many collectives whatever the number of experts is, instead of an exchange of tiny messages.
Symbols: W ranks, M the largest number of tokens of a rank, e experts of a rank.
"""

import dataclasses

import torch
from torch import Tensor

from tutel.dispatcher.exchange import ExchangeDispatcher, ExchangeOptions
from tutel.dispatcher.local import LocalDispatcher
from tutel.distributed.gathering import gather_tokens, scatter_sums
from tutel.distributed.groups import world_rank
from tutel.distributed.handshake import GroupSync
from tutel.experts import ExpertWork
from tutel.functional import accumulator_dtype
from tutel.route import RoutePlan


class GatherDispatcher(ExchangeDispatcher):
    """Gathers tokens, choices and weights; reduces and scatters outputs."""

    def __init__(self, options: ExchangeOptions) -> None:
        super().__init__(options)
        self.local = LocalDispatcher(weigh_inputs=options.weigh_inputs)

    def run(self, tokens: Tensor, plan: RoutePlan, work: ExpertWork) -> Tensor:
        """Compute tokens [T, D] by the experts of all ranks: [T, D_out]."""
        group, count = self.options.group, tokens.shape[0]
        most = GroupSync(group, tokens.device).max(count)
        kept = torch.where(plan.row_index >= 0, plan.topk_ids, -1)
        ids = gather_tokens(kept, most, group, filler=-1)
        weights = gather_tokens(plan.topk_weights.to(accumulator_dtype(tokens.dtype)), most, group)
        everyones = gather_tokens(tokens, most, group)
        output = self.local.run(everyones, self._own_plan(ids, weights, work), work)
        output = self._ready_to_go_back(output, everyones, work)
        return scatter_sums(output, count, group)

    def _own_plan(self, ids: Tensor, weights: Tensor, work: ExpertWork) -> RoutePlan:
        """Plan for the choices [W * M, K] that this rank computes; a token has at most e of them."""
        local = work.context.num_local_experts
        own, places = self._own(ids, work).topk(min(ids.shape[1], local), dim=1)
        plan = RoutePlan.from_topk(own, weights.gather(1, places), local)
        if ids.is_cuda:
            return plan  # reading a count would wait for the device
        return dataclasses.replace(plan, row_choice=plan.row_choice[: int(plan.offsets[-1])])

    def _own(self, ids: Tensor, work: ExpertWork) -> Tensor:
        """Return ids [W * M, K] counted from this rank's first expert on, -1 where another rank computes a choice."""
        options, rank = self.options, world_rank(self.options.group)
        local = work.context.num_local_experts
        own = ids - (rank * local if options.shards == 1 else rank // options.shards)
        is_mine = (own >= 0) & (own < local)
        subgroups = options.shards // options.degree
        if subgroups > 1:
            turn = torch.arange(ids.shape[0], device=ids.device).unsqueeze(1) % subgroups
            is_mine &= turn == rank % options.shards % subgroups
        return torch.where(is_mine, own, -1)
