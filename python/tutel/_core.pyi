"""The Rust module: importing it registers the operators of ``torch.ops.tutel``."""

from typing import Final

__version__: Final[str]
torch_abi_version: str
