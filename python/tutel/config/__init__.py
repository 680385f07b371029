"""Options of the layer, checked once and immutable; the historic dict options translate onto them."""

from tutel.config.experts import (
    CustomExpertsConfig,
    ExpertsConfig,
    FFNConfig,
    LlamaFFNConfig,
    ModulesConfig,
    experts_config,
    resolve_expert_count,
)
from tutel.config.gates import (
    CosineGateConfig,
    CustomGateConfig,
    GateConfig,
    LinearGateConfig,
    MegatronGateConfig,
    gate_configs,
    gate_dicts,
)
from tutel.config.layer import check_seeds, parallel_degree, take_deprecated
from tutel.config.routing import RoutingConfig

__all__ = [
    "CosineGateConfig",
    "CustomExpertsConfig",
    "CustomGateConfig",
    "ExpertsConfig",
    "FFNConfig",
    "GateConfig",
    "LinearGateConfig",
    "LlamaFFNConfig",
    "MegatronGateConfig",
    "ModulesConfig",
    "RoutingConfig",
    "check_seeds",
    "experts_config",
    "gate_configs",
    "gate_dicts",
    "parallel_degree",
    "resolve_expert_count",
    "take_deprecated",
]
