"""Gates: modules that give logits [T, E]. What is chosen and dropped is the business of ``tutel.route``."""

from tutel.gates.base import Gate, add_noise, gate_logits
from tutel.gates.cosine import CosineGate
from tutel.gates.linear import LinearGate
from tutel.gates.make import make_gate

__all__ = ["CosineGate", "Gate", "LinearGate", "add_noise", "gate_logits", "make_gate"]
