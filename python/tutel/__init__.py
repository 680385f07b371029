"""Tutel: a Mixture-of-Experts layer for PyTorch, its core in Rust.

``from tutel import moe`` gives the layer, :class:`tutel.moe.moe_layer`.
"""

from tutel._requirements import require_torch

require_torch()

from tutel._core import __version__  # noqa: E402  (registers the operators with torch, which must be there first)

__all__ = ["__version__"]
