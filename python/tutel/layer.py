"""The Mixture-of-Experts layer.

Symbols: T tokens, D model_dim, E experts, K choices a token, R = T * K rows, C capacity.

1. the gate gives logits [T, E]
2. route makes the plan: who goes where, with which weight
3. the dispatcher brings tokens to rows [R, D], expert by expert
4. each expert computes its rows
5. the dispatcher combines rows back to tokens [T, D_out]
6. the plan's scores give the auxiliary loss
"""

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tutel import env
from tutel.config import GateConfig, RoutingConfig, ffn_config, gate_configs, resolve_expert_count
from tutel.dispatcher import LocalDispatcher
from tutel.errors import check_bool, check_int, check_keys, check_number, check_tensor
from tutel.experts import FFNExperts
from tutel.gates import Gate, LinearGate
from tutel.losses import gshard_loss
from tutel.route import RoutePlan, route
from tutel.sync import LocalSync

_DEPRECATED = {
    "pad_samples": "batches may have any size now",
    "fp32_gate": "set 'fp32_gate' in gate_type",
}


class MOELayer(nn.Module):
    """A Mixture-of-Experts layer: each token is computed by the few experts that its gate chooses.

    Args:
        gate_type: A dict {'type': 'top', 'k': 2, ...}, or a list of them to choose from at each forward.
        model_dim: D, width of a token.
        experts: A dict {'type': 'ffn', 'count_per_node': 2, 'hidden_size_per_expert': 2048, 'activation_fn': ...}.
        scan_expert_func: Called as f(name, parameter) for each parameter of the local experts.
        result_func: Formats the output: its result is what forward returns. ``output.l_aux`` is the auxiliary loss.
        group: Process group of the ranks that share the experts.
        seeds: (shared, local, after): torch's seed before the gates, before the experts, and when the layer is made;
            None leaves the generator alone. The last may be left out.
        a2a_ffn_overlap_degree: Chunks in which exchange and computation overlap; the result is the same.
        is_postscore: Weights multiply the experts' outputs, or else their inputs.
        batch_prioritized_routing: Serve tokens in descending order of their largest score, where a gate does not say.
        normalize_gate: Divide a token's weights by their sum (K > 1).
        is_gshard_loss: The auxiliary loss is GShard's.
        parallel_type: How ranks that share an expert divide it: 'data', 'model', 'auto' or 'adaptive:r'.
        use_2dh: Exchange inside nodes first, then across.

    Attributes:
        l_aux: Auxiliary loss of the last forward, None before the first.
        dispatch_count: [E] int64, tokens that chose each expert in the last forward, dropped ones included.
        experts: The local experts.
        gates: The gates.

    Raises:
        TypeError: If an option has the wrong type.
        ValueError: If an option is unknown, missing or out of range; the message lists what is allowed.
    """

    l_aux: Tensor | None
    _num_global_experts: Tensor

    def __init__(
        self,
        gate_type: Any,
        model_dim: int,
        experts: Mapping[str, Any],
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
        **kwargs: Any,
    ) -> None:
        super().__init__()
        _warn_deprecated(kwargs)
        _require_one_rank(group)
        self.group = group
        self.world_size = 1
        self.model_dim = check_int("model_dim", model_dim, at_least=1)
        self.is_postscore = check_bool("is_postscore", is_postscore)
        self.use_2dh = check_bool("use_2dh", use_2dh)
        self.a2a_ffn_overlap_degree = check_int("a2a_ffn_overlap_degree", a2a_ffn_overlap_degree, at_least=1)
        if not check_bool("is_gshard_loss", is_gshard_loss):
            raise NotImplementedError("is_gshard_loss=False (the load-importance loss) is not implemented yet")
        prioritized = (
            env.batch_prioritized_routing()
            if batch_prioritized_routing is None
            else (check_bool("batch_prioritized_routing", batch_prioritized_routing))
        )
        gates = gate_configs(gate_type, normalize=check_bool("normalize_gate", normalize_gate), prioritized=prioritized)
        self.num_local_experts, self.sharded_count = resolve_expert_count(
            gate_type, experts, world_size=self.world_size
        )
        self.num_global_experts = self.global_expert_count(self.num_local_experts, group)
        self.valid_rs = [0, 1]
        self.adaptive_degree = _parallel_degree(parallel_type, self.sharded_count)
        self.result_func = _check_callable("result_func", result_func)
        self._sync = LocalSync()
        self._dispatcher = LocalDispatcher(weigh_inputs=not self.is_postscore)

        shared, local, after = _check_seeds(seeds)
        _seed(local)
        self.experts = FFNExperts(self.model_dim, ffn_config(experts, num_local_experts=self.num_local_experts))
        self._mark_experts(_check_callable("scan_expert_func", scan_expert_func))
        self.gates = nn.ModuleList()
        for index, gate in enumerate(gates):
            _seed(None if shared is None else shared + index)
            self.gates.append(self._make_gate(gate))
        _seed(after)

        self.register_buffer("_num_global_experts", torch.tensor(self.num_global_experts))
        self.l_aux = None
        self.dispatch_count: Tensor | None = None

    def _make_gate(self, config: GateConfig) -> Gate:
        routing = dataclasses.replace(config.routing, top_k=min(config.routing.top_k, self.num_global_experts))
        return LinearGate(self.model_dim, self.num_global_experts, routing, fp32=config.fp32)

    def _mark_experts(self, scan: Callable[[str, nn.Parameter], object] | None) -> None:
        for name, parameter in self.experts.named_parameters():
            parameter._tutel_expert = True  # type: ignore[attr-defined]
            if scan is not None:
                scan(name, parameter)

    @staticmethod
    def global_expert_count(num_local_experts: int, group: Any = None) -> int:
        """Return E for a number of local experts on each rank of a group."""
        _require_one_rank(group)
        return check_int("num_local_experts", num_local_experts, at_least=1)

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
            input: [..., D] with at least two dimensions, floating point; T is the product of the leading ones.
            gate_index: Which gate to use.
            capacity_factor: Of the gate.
            top_k: Of the gate, limited to E.
            a2a_ffn_overlap_degree: Of the layer.
            reserve_dims: How many trailing dimensions make up D.
            inequivalent_tokens: Ranks may hold different T.
            adaptive_r: Degree of model parallelism among ranks that share an expert, one of ``valid_rs``.
            megablocks_size: Accepted: rows are never padded here.

        Returns:
            [..., D] in the input's dtype, with the auxiliary loss as attribute ``l_aux``; or what result_func makes of
            it.

        Raises:
            TypeError: If an argument has the wrong type or dtype.
            ValueError: If shapes, devices or numbers are out of range.
        """
        self._set_call_options(a2a_ffn_overlap_degree, adaptive_r, megablocks_size)
        tokens = self._tokens(input, check_int("reserve_dims", reserve_dims, at_least=1))
        gate, routing = self._gate(gate_index, capacity_factor, top_k)

        with torch.autocast(tokens.device.type, enabled=False):
            logits = gate.add_noise(gate(tokens))
            plan = route(logits, routing, self._sync, inequivalent_tokens=inequivalent_tokens)
        rows, handle = self._dispatcher.dispatch(tokens, plan)
        rows = self.experts.compute(rows, self.experts.weights())
        output = self._dispatcher.combine(rows, handle)
        return self._result(output, input.shape[:-reserve_dims], input, plan, gshard_loss(plan, logits.dtype))

    def _tokens(self, value: Tensor, reserve_dims: int) -> Tensor:
        check_tensor("input", value, like=("the layer's weights", self.experts.weights().fc1))
        if value.dim() < reserve_dims + 1:
            raise ValueError(f"input must have at least {reserve_dims + 1} dimensions, got shape {list(value.shape)}")
        width = value.shape[-reserve_dims:].numel()
        if width != self.model_dim:
            raise ValueError(
                f"input's last {'dimension' if reserve_dims == 1 else f'{reserve_dims} dimensions'} must hold "
                f"model_dim={self.model_dim} values, got shape {list(value.shape)}"
            )
        return value.reshape(value.shape[:-reserve_dims].numel(), width)

    def _gate(self, gate_index: int, capacity_factor: float | None, top_k: int | None) -> tuple[Gate, RoutingConfig]:
        index = check_int("gate_index", gate_index, at_least=0)
        if index >= len(self.gates):
            raise ValueError(f"gate_index must be below the number of gates ({len(self.gates)}), got {index}")
        gate = self.gates[index]
        assert isinstance(gate, Gate)
        changes: dict[str, Any] = {}
        if capacity_factor is not None:
            changes["capacity_factor"] = check_number("capacity_factor", capacity_factor)
        if top_k is not None:
            changes["top_k"] = min(check_int("top_k", top_k, at_least=1), self.num_global_experts)
        return gate, dataclasses.replace(gate.routing, **changes) if changes else gate.routing

    def _set_call_options(self, overlap_degree: int | None, adaptive_r: int | None, megablocks_size: int) -> None:
        """Check the options of an exchange, which one rank has none of; they are reported all the same."""
        if overlap_degree is not None:
            self.a2a_ffn_overlap_degree = check_int("a2a_ffn_overlap_degree", overlap_degree, at_least=1)
        if adaptive_r is not None:
            if adaptive_r not in self.valid_rs:
                raise ValueError(f"adaptive_r must be one of {self.valid_rs}, got {adaptive_r!r}")
            self.adaptive_degree = int(adaptive_r)
        check_int("megablocks_size", megablocks_size, at_least=0)

    def _result(self, output: Tensor, leading: torch.Size, given: Tensor, plan: RoutePlan, l_aux: Tensor) -> Any:
        same_width = output.shape[1] == self.model_dim
        result = output.reshape(given.shape if same_width else (*leading, output.shape[1])).to(given.dtype)
        self.l_aux = l_aux
        self.dispatch_count = plan.tokens_per_expert
        result.l_aux = l_aux  # type: ignore[attr-defined]
        return result if self.result_func is None else self.result_func(result)

    def extra_repr(self) -> str:
        """Describe the sizes."""
        return f"model_dim={self.model_dim}, num_global_experts={self.num_global_experts}"

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the last forward's graph, which can be neither copied nor stored."""
        return {**self.__dict__, "l_aux": None, "dispatch_count": None}


def _warn_deprecated(options: Mapping[str, Any]) -> None:
    for name in options:
        if name not in _DEPRECATED:
            check_keys("moe_layer", options, _DEPRECATED)
        warnings.warn(f"{name} has no effect: {_DEPRECATED[name]}", DeprecationWarning, stacklevel=3)


def _require_one_rank(group: Any) -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        ranks = torch.distributed.get_world_size(group)
        if ranks > 1:
            raise NotImplementedError(f"experts over several ranks are not implemented yet: the group has {ranks}")


def _parallel_degree(parallel_type: str, sharded_count: int) -> int:
    named = {"data": 1, "model": sharded_count, "auto": 1}
    if parallel_type in named:
        return named[parallel_type]
    kind, _, degree = str(parallel_type).partition(":")
    if kind != "adaptive":
        raise ValueError(f"parallel_type must be 'data', 'model', 'auto' or 'adaptive:r', got {parallel_type!r}")
    return min(check_int("parallel_type='adaptive:r', r", degree, at_least=0), sharded_count)


def _check_callable(name: str, value: Any) -> Any:
    if value is not None and not callable(value):
        raise TypeError(f"{name} must be callable or None, got {value!r}")
    return value


def _check_seeds(seeds: Any) -> tuple[int | None, int | None, int | None]:
    if seeds is None:
        return None, None, None
    if not isinstance(seeds, tuple | list) or len(seeds) not in (2, 3):
        raise ValueError(f"seeds must be (shared, local) or (shared, local, after), got {seeds!r}")
    checked = [None if seed is None else check_int("seeds", seed, at_least=-(2**63)) for seed in (*seeds, None)]
    return checked[0], checked[1], checked[2]


def _seed(seed: int | None) -> None:
    if seed is not None:
        torch.manual_seed(seed)
