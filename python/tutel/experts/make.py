"""From options to modules."""

from torch import nn

from tutel.config import ExpertsConfig, FFNConfig, LlamaFFNConfig, ModulesConfig
from tutel.experts.custom import make_custom_experts
from tutel.experts.ffn import FFNExperts
from tutel.experts.llama_ffn import LlamaFFNExperts
from tutel.experts.modules import ModuleExperts


def make_experts(model_dim: int, sharded_count: int, config: ExpertsConfig) -> nn.Module:
    """Make the experts of one rank."""
    if isinstance(config, FFNConfig):
        return FFNExperts(model_dim, config)
    if isinstance(config, LlamaFFNConfig):
        return LlamaFFNExperts(model_dim, config)
    if isinstance(config, ModulesConfig):
        return ModuleExperts(config.modules)
    return make_custom_experts(model_dim, sharded_count, config)
