"""The Rust module: importing it registers the operators of ``torch.ops.tutel``."""

from typing import Final

__all__ = ["__version__", "activations", "cpu_level", "set_cpu_level", "torch_abi_version"]

__version__: Final[str]
torch_abi_version: str

def activations() -> list[str]:
    """Return the names of the activations that kernels know, in the order of their numbers."""

def cpu_level() -> str:
    """Return the level of processor features that kernels use."""

def set_cpu_level(name: str) -> None:
    """Use no more of the processor's features than those of this level from now on."""
