"""What a user's own experts see of the layer."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class ExpertContext:
    """The ``ctx`` of ``forward(x, ctx)``.

    Attributes:
        sharded_count: Ranks that share one expert.
        group: The layer's process group.
        adaptive_degree: Degree of model parallelism among the ranks that share an expert, in this forward.
        num_global_experts: E.
        num_local_experts: e.
        model_dim: D.
        world_size: Ranks of the group.
        dispatch_count: [E] int64, tokens that chose each expert, dropped ones included.
        megablocks_size: As given to this forward.
    """

    sharded_count: int
    group: Any
    adaptive_degree: int
    num_global_experts: int
    num_local_experts: int
    model_dim: int
    world_size: int
    dispatch_count: Tensor
    megablocks_size: int
