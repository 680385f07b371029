"""Experts: modules that own parameters and compute on expert-major rows."""

from tutel.experts.ffn import FFNExperts, FFNWeights
from tutel.experts.rows import Rows

__all__ = ["FFNExperts", "FFNWeights", "Rows"]
