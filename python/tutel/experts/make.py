"""From options to modules."""

import dataclasses

from torch import nn

from tutel.config import ExpertsConfig, FFNConfig, LlamaFFNConfig, ModulesConfig
from tutel.experts.custom import make_custom_experts
from tutel.experts.ffn import FFNExperts
from tutel.experts.llama_ffn import LlamaFFNExperts
from tutel.experts.modules import ModuleExperts


def make_experts(model_dim: int, sharded_count: int, config: ExpertsConfig) -> nn.Module:
    """Make the experts of one rank, each of which holds the sharded_count-th part of an expert's hidden units.

    Raises:
        ValueError: If the hidden units cannot be divided so.
    """
    if isinstance(config, FFNConfig | LlamaFFNConfig):
        if config.hidden_size % sharded_count:
            raise ValueError(
                f"experts['hidden_size_per_expert'] must be a multiple of the ranks that share an expert "
                f"({sharded_count}), got {config.hidden_size}"
            )
        config = dataclasses.replace(config, hidden_size=config.hidden_size // sharded_count)
    if isinstance(config, FFNConfig):
        return FFNExperts(model_dim, dataclasses.replace(config, shards=sharded_count))
    if isinstance(config, LlamaFFNConfig):
        return LlamaFFNExperts(model_dim, config)
    if isinstance(config, ModulesConfig):
        return ModuleExperts(config.modules)
    return make_custom_experts(model_dim, sharded_count, config)
