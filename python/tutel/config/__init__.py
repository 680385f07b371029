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
from tutel.config.layer import (
    ExchangeConfig,
    check_seeds,
    exchange_config,
    parallel_degree,
    parallel_degrees,
    take_deprecated,
)
from tutel.config.routing import RoutingConfig

__all__ = [
    "CosineGateConfig",
    "CustomExpertsConfig",
    "CustomGateConfig",
    "ExchangeConfig",
    "ExpertsConfig",
    "FFNConfig",
    "GateConfig",
    "LinearGateConfig",
    "LlamaFFNConfig",
    "MegatronGateConfig",
    "ModulesConfig",
    "RoutingConfig",
    "check_seeds",
    "exchange_config",
    "experts_config",
    "gate_configs",
    "gate_dicts",
    "parallel_degree",
    "parallel_degrees",
    "resolve_expert_count",
    "take_deprecated",
]
