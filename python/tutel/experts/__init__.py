"""Experts: modules that own parameters and compute on expert-major rows."""

from tutel.experts.context import ExpertContext
from tutel.experts.ffn import FFNExperts, FFNWeights
from tutel.experts.llama_ffn import LlamaFFNExperts
from tutel.experts.make import make_experts
from tutel.experts.modules import ModuleExperts
from tutel.experts.own import OwnExperts
from tutel.experts.padded import compute_experts, takes_padded, takes_tokens
from tutel.experts.rows import PaddedRows, Rows
from tutel.experts.work import ExpertWork

__all__ = [
    "ExpertContext",
    "ExpertWork",
    "FFNExperts",
    "FFNWeights",
    "LlamaFFNExperts",
    "ModuleExperts",
    "OwnExperts",
    "PaddedRows",
    "Rows",
    "compute_experts",
    "make_experts",
    "takes_padded",
    "takes_tokens",
]
