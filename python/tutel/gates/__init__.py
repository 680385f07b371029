"""Gates: modules that give logits [T, E]. What is chosen and dropped is the business of ``tutel.route``."""

from tutel.gates.base import Gate
from tutel.gates.linear import LinearGate

__all__ = ["Gate", "LinearGate"]
