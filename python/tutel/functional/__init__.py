"""The operators with their gradients: plain functions of tensors, each checked, differentiable and compilable.

Symbols: T tokens, D their width, E experts, K choices a token, R rows (R = T * K).
"""

from tutel.functional._operators import accumulator_dtype
from tutel.functional.assign_rows import RowAssignment, assign_rows
from tutel.functional.combine import combine
from tutel.functional.dispatch import dispatch
from tutel.functional.expert_ffn import ACTIVATIONS, Routes, expert_ffn
from tutel.functional.grouped_gemm import grouped_gemm
from tutel.functional.padded_rows import padded_rows
from tutel.functional.prefix_count import prefix_count
from tutel.functional.select_experts import Selection, select_experts

__all__ = [
    "ACTIVATIONS",
    "Routes",
    "RowAssignment",
    "Selection",
    "accumulator_dtype",
    "assign_rows",
    "combine",
    "dispatch",
    "expert_ffn",
    "grouped_gemm",
    "padded_rows",
    "prefix_count",
    "select_experts",
]
