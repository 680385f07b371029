"""Tutel: a Mixture-of-Experts layer for PyTorch, its core in Rust.

``from tutel import moe`` gives the layer, :class:`tutel.moe.moe_layer`.
"""

from tutel._requirements import require_torch

require_torch()

from tutel import env  # noqa: E402  (torch must be there first)
from tutel._core import __version__, set_cpu_level  # noqa: E402  (registers the operators with torch)

if env.cpu_level():
    set_cpu_level(env.cpu_level())

__all__ = ["__version__"]
