"""The Mixture-of-Experts layer.

Symbols: T tokens, D model_dim, E experts, K choices a token, R = T * K rows, C capacity.

1. the gate gives logits [T, E]
2. route makes the plan: who goes where, with which weight
3. the dispatcher brings tokens to rows [R, D], expert by expert
4. each expert computes its rows
5. the dispatcher combines rows back to tokens [T, D_out]
6. the plan's scores give the auxiliary loss
"""

import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tutel import config, env
from tutel.config import CustomGateConfig, LinearGateConfig, MegatronGateConfig, RoutingConfig
from tutel.dispatcher import Dispatchers
from tutel.distributed.auto import automatic_degree
from tutel.distributed.dtensor import take_local
from tutel.distributed.groups import world_size
from tutel.distributed.handshake import GroupSync
from tutel.distributed.shards import gathered_weights
from tutel.errors import check_bool, check_callable, check_int, check_number, check_tensor
from tutel.experts import ExpertContext, ExpertWork, make_experts
from tutel.experts.loading import prepare_state
from tutel.gates import add_noise, gate_logits, make_gate
from tutel.losses import auxiliary_loss
from tutel.route import RoutePlan, route
from tutel.sync import LocalSync
from tutel.tensor_parallel import compute_dense


class MOELayer(nn.Module):
    """A Mixture-of-Experts layer: each token is computed by the few experts that its gate chooses.

    Every option, its default and its meaning: docs/options.md.

    Args:
        gate_type: A dict {'type': 'top', 'k': 2, ...}, or a list of them to choose from at each forward.
        model_dim: D, width of a token.
        experts: A dict {'type': 'ffn', 'count_per_node': 2, 'hidden_size_per_expert': 2048, 'activation_fn': ...}, or
            one ``nn.Module`` an expert: a module, a list, an ``nn.ModuleList``.
        scan_expert_func: Called as f(name, parameter) for each parameter of the local experts.
        result_func: Formats the output: its result is what forward returns. ``output.l_aux`` is the auxiliary loss.
        group: Process group of the ranks that share the experts.
        seeds: (shared, local, after): torch's seed before the gates, before the experts, and when the layer is made;
            None leaves the generator alone. The last may be left out.
        a2a_ffn_overlap_degree: Chunks in which exchange and computation overlap; the result is the same.
        is_postscore: Weights multiply the experts' outputs, or else their inputs.
        batch_prioritized_routing: Serve tokens in descending order of their largest score, where a gate does not say.
        normalize_gate: Divide a token's weights by their sum (K > 1).
        is_gshard_loss: The auxiliary loss is GShard's, or else the load-importance loss (which needs gate_noise > 0).
        parallel_type: How ranks that share an expert divide it: 'data', 'model', 'auto' or 'adaptive:r'.
        use_2dh: Exchange inside nodes first, then across.
        exchange: How rows reach the ranks of their experts: 'ragged' sends exactly those that there are, 'fixed' as
            many as the capacity to every expert, 'gather' brings all tokens to all ranks (for few tokens).
        wire_dtype: What rows are narrowed to while they travel: None, 'bfloat16' or 'float8_e4m3'.

    Attributes:
        l_aux: Auxiliary loss of the last forward, None before the first.
        dispatch_count: [E] int64, tokens that chose each expert in the last forward, dropped ones included.
        experts: The local experts.
        gates: The gates; their ``top_k``, ``capacity_factor`` and ``gate_noise`` may be changed between forwards.

    Raises:
        TypeError: If an option has the wrong type.
        ValueError: If an option is unknown, missing or out of range; the message lists what is allowed.
    """

    l_aux: Tensor | None
    dispatch_count: Tensor | None
    _num_global_experts: Tensor

    def __init__(
        self,
        gate_type: Any,
        model_dim: int,
        experts: Any,
        scan_expert_func: Callable[[str, nn.Parameter], object] | None = None,
        result_func: Callable[[Tensor], Any] | None = None,
        group: Any = None,
        seeds: tuple[int | None, ...] | None = None,
        a2a_ffn_overlap_degree: int = 1,
        is_postscore: bool = True,
        batch_prioritized_routing: bool | None = None,
        normalize_gate: bool = True,
        is_gshard_loss: bool = True,
        parallel_type: str = "adaptive:1",
        use_2dh: bool = False,
        exchange: str = "ragged",
        wire_dtype: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.group = group
        self.world_size = world_size(group)
        self.model_dim = check_int("model_dim", model_dim, at_least=1)
        self.is_postscore = check_bool("is_postscore", is_postscore)
        self.is_gshard_loss = check_bool("is_gshard_loss", is_gshard_loss)
        self.use_2dh = check_bool("use_2dh", use_2dh) or (exchange == "ragged" and env.hierarchical_exchange())
        self._overlap_degree = check_int("a2a_ffn_overlap_degree", a2a_ffn_overlap_degree, at_least=1)
        self.a2a_ffn_overlap_degree = self._overlap_degree
        self.result_func = None if result_func is None else check_callable("result_func", result_func)
        self._skip_moe, self._skip_expert, self._ones_gate = env.skip_moe(), env.skip_expert(), env.ones_gate()

        gates = config.take_deprecated(kwargs, config.gate_dicts(gate_type), constructor=type(self))
        self.num_local_experts, self.sharded_count = config.resolve_expert_count(
            gates, experts, world_size=self.world_size
        )
        self.num_global_experts = self.num_local_experts * self.world_size // self.sharded_count
        self._dispatchers = Dispatchers(
            group,
            shards=self.sharded_count,
            weigh_inputs=not self.is_postscore,
            exchange=config.exchange_config(exchange, use_2dh=self.use_2dh, wire_dtype=wire_dtype),
        )
        self._automatic = parallel_type == "auto"
        self._shard_degree = config.parallel_degree(parallel_type, self.sharded_count)
        self.adaptive_degree = self._shard_degree
        if batch_prioritized_routing is None:
            batch_prioritized_routing = env.batch_prioritized_routing()
        gate_configs = config.gate_configs(
            gates,
            normalize=check_bool("normalize_gate", normalize_gate),
            prioritized=check_bool("batch_prioritized_routing", batch_prioritized_routing),
        )
        experts_config = config.experts_config(
            experts, num_local_experts=self.num_local_experts, model_dim=self.model_dim
        )
        self._check_megatron(gate_configs, experts_config)
        self.valid_rs = config.parallel_degrees(experts_config, self.sharded_count, self.world_size)
        if self._shard_degree not in self.valid_rs:
            raise ValueError(f"parallel_type={parallel_type!r}: r must be one of {self.valid_rs} for these experts")

        shared, local, after = config.check_seeds(seeds)
        _seed(local)
        self.experts = make_experts(self.model_dim, self.sharded_count, experts_config)
        self._mark_experts(scan_expert_func)
        self._make_gates(gate_configs, shared)
        _seed(after)

        self.register_buffer("_num_global_experts", torch.tensor(self.num_global_experts))
        self.register_load_state_dict_pre_hook(_prepare_state)  # type: ignore[no-untyped-call]
        self.l_aux = None
        self.dispatch_count = None

    def _check_megatron(self, gates: list[config.GateConfig], experts: config.ExpertsConfig) -> None:
        if isinstance(gates[0], MegatronGateConfig):
            if not isinstance(experts, config.FFNConfig):
                raise ValueError("a gate of type 'megatron' needs experts of type 'ffn'")
            if self.num_local_experts != 1 or self.sharded_count != 1:
                raise ValueError(
                    f"a gate of type 'megatron' needs one expert a device, got {self.num_local_experts} "
                    f"shared by {self.sharded_count}"
                )

    def _make_gates(self, gates: list[config.GateConfig], shared_seed: int | None) -> None:
        self.gates = nn.ModuleList()
        self._routing: list[RoutingConfig] = []
        self._input_dropout: list[float] = []
        for index, gate in enumerate(gates):
            if isinstance(gate, MegatronGateConfig):
                return
            _seed(None if shared_seed is None else shared_seed + index)
            if not isinstance(gate, CustomGateConfig):
                limited = min(gate.routing.top_k, self.num_global_experts)
                gate = dataclasses.replace(gate, routing=dataclasses.replace(gate.routing, top_k=limited))
            self.gates.append(make_gate(self.model_dim, self.num_global_experts, gate))
            self._routing.append(gate.routing)
            self._input_dropout.append(gate.input_dropout if isinstance(gate, LinearGateConfig) else 0.0)

    def _mark_experts(self, scan: Callable[[str, nn.Parameter], object] | None) -> None:
        if scan is not None:
            check_callable("scan_expert_func", scan)
        for name, parameter in self.experts.named_parameters():
            parameter._tutel_expert = True  # type: ignore[attr-defined]
            if scan is not None:
                scan(name, parameter)

    @staticmethod
    def global_expert_count(num_local_experts: int, group: Any = None) -> int:
        """Return E for a number of local experts on each rank of a group; -n or 1 / n: n ranks share one."""
        ranks = world_size(group)
        local, shards = config.resolve_expert_count([], {"count_per_node": num_local_experts}, world_size=ranks)
        return local * ranks // shards

    def get_parameter_iterator(self, param_type: str) -> Iterator[tuple[str, nn.Parameter]]:
        """Iterate over the named parameters of the gates ('gate') or of the local experts ('local_experts')."""
        if param_type == "gate":
            return self.gates.named_parameters()
        if param_type == "local_experts":
            return self.experts.named_parameters()
        raise ValueError(f"param_type must be 'gate' or 'local_experts', got {param_type!r}")

    def forward(
        self,
        input: Tensor,  # noqa: A002  (the historic name, which programs pass by keyword)
        gate_index: int = 0,
        capacity_factor: float | None = None,
        top_k: int | None = None,
        a2a_ffn_overlap_degree: int | None = None,
        reserve_dims: int = 1,
        inequivalent_tokens: bool = False,
        adaptive_r: int | None = None,
        megablocks_size: int = 0,
    ) -> Any:
        """Compute the layer; every option but the input overrides the layer's own for this call only.

        Args:
            input: [..., D] with at least two dimensions, floating point; T is the product of the leading ones. Also a
                DTensor that is divided along its tokens: each rank computes its own, and the output is divided alike.
            gate_index: Which gate to use.
            capacity_factor: Of the gate.
            top_k: Of the gate, limited to E.
            a2a_ffn_overlap_degree: Of the layer.
            reserve_dims: How many trailing dimensions make up D.
            inequivalent_tokens: Ranks may hold different T.
            adaptive_r: Degree of model parallelism among ranks that share an expert, one of ``valid_rs``.
            megablocks_size: Accepted: rows are never padded here, except for experts that ask for it.

        Returns:
            [..., D] in the input's dtype, with the auxiliary loss as attribute ``l_aux``; or what result_func makes of
            it.

        Raises:
            TypeError: If an argument has the wrong type or dtype.
            ValueError: If shapes, devices or numbers are out of range.
        """
        self._set_call_options(a2a_ffn_overlap_degree, adaptive_r)
        reserve_dims = check_int("reserve_dims", reserve_dims, at_least=1)
        local, give_back = take_local(input, reserve_dims)
        tokens = self._tokens(local, reserve_dims)
        megablocks_size = check_int("megablocks_size", megablocks_size, at_least=0)
        if self._skip_moe:
            output, l_aux = tokens.clone(), tokens.new_zeros(())
        elif not self.gates:
            if gate_index != 0 or capacity_factor is not None or top_k is not None:
                raise ValueError("gate_index, capacity_factor and top_k do not apply: a gate 'megatron' has no routing")
            output, l_aux = self._dense(tokens, megablocks_size), tokens.new_zeros(())
        else:
            gate, routing = self._gate(gate_index, capacity_factor, top_k)
            if self._automatic and adaptive_r is None and len(self.valid_rs) > 1 and self.world_size > 1:
                self.adaptive_degree = automatic_degree(
                    self.experts,
                    tokens,
                    routing,
                    num_experts=self.num_global_experts,
                    valid_degrees=self.valid_rs,
                    chunks=self.a2a_ffn_overlap_degree,
                    exchange=self._dispatchers.exchange,
                    group=self.group,
                )
            tokens = self._drop_inputs(tokens, int(gate_index))
            plan, l_aux = self._route(
                tokens, gate, routing, inequivalent_tokens=check_bool("inequivalent_tokens", inequivalent_tokens)
            )
            output = self._compute(tokens, plan, megablocks_size)
        return self._result(output, l_aux, local, reserve_dims, give_back)

    def _drop_inputs(self, tokens: Tensor, gate_index: int) -> Tensor:
        probability = self._input_dropout[gate_index]
        return F.dropout(tokens, probability, self.training) if probability else tokens

    def _route(
        self, tokens: Tensor, gate: nn.Module, routing: RoutingConfig, *, inequivalent_tokens: bool
    ) -> tuple[RoutePlan, Tensor]:
        """Return the plan and the auxiliary loss."""
        clean_logits = gate_logits(gate, tokens, self.num_global_experts)
        noisy = self.training and routing.gate_noise > 0
        logits = add_noise(clean_logits, routing.gate_noise) if noisy else clean_logits
        sync = LocalSync() if self.world_size == 1 else GroupSync(self.group, tokens.device)
        plan = route(logits, routing, sync, inequivalent_tokens=inequivalent_tokens)
        l_aux = auxiliary_loss(plan, clean_logits, logits, routing.gate_noise, gshard=self.is_gshard_loss)
        self.dispatch_count = plan.tokens_per_expert
        if self._ones_gate:
            plan = dataclasses.replace(plan, topk_weights=torch.ones_like(plan.topk_weights))
        return plan, l_aux

    def _compute(self, tokens: Tensor, plan: RoutePlan, megablocks_size: int) -> Tensor:
        """Dispatch tokens, compute experts and combine."""
        way = self.adaptive_degree, self.a2a_ffn_overlap_degree
        if self.world_size > 1:
            self._dispatchers.agree(tokens, plan, *way, experts=self.experts, skip_expert=self._skip_expert)
        dispatcher = self._dispatchers.choose(*way)
        return dispatcher.run(tokens, plan, self._work(megablocks_size))

    def _dense(self, tokens: Tensor, megablocks_size: int) -> Tensor:
        """Compute all ranks' tokens by one expert, of which each rank has a part, as the gate ``megatron`` does."""
        self.dispatch_count = torch.full((self.num_global_experts,), tokens.shape[0], device=tokens.device)
        return tokens.clone() if self._skip_expert else compute_dense(tokens, self._work(megablocks_size), self.group)

    def _work(self, megablocks_size: int) -> ExpertWork:
        weights = None
        if not self._skip_expert:
            # Ranks that only gather tokens, as `megatron` does, have whole experts, and one each.
            degree = self.adaptive_degree if self.gates else 1
            weights = gathered_weights(self.experts, shards=self.sharded_count, degree=degree, group=self.group)
        return ExpertWork(self.experts, weights, self._context(megablocks_size), skip=self._skip_expert)

    def _set_call_options(self, overlap_degree: int | None, adaptive_r: int | None) -> None:
        """Check the options of an exchange; this call's values are reported."""
        degree = self._overlap_degree if overlap_degree is None else overlap_degree
        self.a2a_ffn_overlap_degree = check_int("a2a_ffn_overlap_degree", degree, at_least=1)
        if adaptive_r is not None and adaptive_r not in self.valid_rs:
            raise ValueError(f"adaptive_r must be one of {self.valid_rs}, got {adaptive_r!r}")
        self.adaptive_degree = self._shard_degree if adaptive_r is None else int(adaptive_r)

    def _tokens(self, value: Tensor, reserve_dims: int) -> Tensor:
        parameter = next(self.parameters(), None)
        check_tensor("input", value, like=None if parameter is None else ("the layer's parameters", parameter))
        if value.dim() < reserve_dims + 1:
            raise ValueError(f"input must have at least {reserve_dims + 1} dimensions, got shape {list(value.shape)}")
        width = value.shape[-reserve_dims:].numel()
        if width != self.model_dim:
            trailing = "dimension" if reserve_dims == 1 else f"{reserve_dims} dimensions"
            raise ValueError(
                f"input's last {trailing} must hold model_dim={self.model_dim} values, got shape {list(value.shape)}"
            )
        return value.reshape(-1, width)  # not shape.numel(), which torch.export would take for a constant

    def _gate(
        self, gate_index: int, capacity_factor: float | None, top_k: int | None
    ) -> tuple[nn.Module, RoutingConfig]:
        index = check_int("gate_index", gate_index, at_least=0)
        if index >= len(self.gates):
            raise ValueError(f"gate_index must be below the number of gates ({len(self.gates)}), got {index}")
        gate, routing = self.gates[index], self._routing[index]
        # A gate's own attributes win over its options, an argument of this call over both.
        top_k = check_int("top_k", gate.top_k if top_k is None else top_k, at_least=1)
        if capacity_factor is None:
            capacity_factor = getattr(gate, "capacity_factor", routing.capacity_factor)
        return gate, dataclasses.replace(
            routing,
            top_k=min(top_k, self.num_global_experts),
            capacity_factor=check_number("capacity_factor", capacity_factor),
            gate_noise=getattr(gate, "gate_noise", routing.gate_noise),
        )

    def _context(self, megablocks_size: int) -> ExpertContext:
        assert self.dispatch_count is not None
        return ExpertContext(
            sharded_count=self.sharded_count,
            group=self.group,
            adaptive_degree=self.adaptive_degree,
            num_global_experts=self.num_global_experts,
            num_local_experts=self.num_local_experts,
            model_dim=self.model_dim,
            world_size=self.world_size,
            dispatch_count=self.dispatch_count,
            megablocks_size=megablocks_size,
        )

    def _result(
        self, output: Tensor, l_aux: Tensor, given: Tensor, reserve_dims: int, give_back: Callable[[Tensor], Tensor]
    ) -> Any:
        same_width = output.shape[1] == self.model_dim
        shape = given.shape if same_width else (*given.shape[:-reserve_dims], output.shape[1])
        result = give_back(output.reshape(shape).to(given.dtype))
        self.l_aux = l_aux
        result.l_aux = l_aux  # type: ignore[attr-defined]
        return result if self.result_func is None else self.result_func(result)

    def extra_repr(self) -> str:
        """Describe the sizes."""
        return f"model_dim={self.model_dim}, num_global_experts={self.num_global_experts}"

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the last forward's graph, which can be neither copied nor stored."""
        return {**self.__dict__, "l_aux": None, "dispatch_count": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> "MOELayer":
        """Copy all but the process group, of which there is one."""
        if self.group is not None:
            memo[id(self.group)] = self.group
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return copied

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Mark the parameters again: ``copy.deepcopy`` of a parameter leaves its attributes out."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._mark_experts(None)


def _prepare_state(
    layer: MOELayer, state: dict[str, Any], prefix: str, _metadata: Any, _strict: bool, *lists: list[str]
) -> None:
    prepare_state(layer, state, prefix, lists[-1])


def _seed(seed: int | None) -> None:
    if seed is not None:
        torch.manual_seed(seed)
