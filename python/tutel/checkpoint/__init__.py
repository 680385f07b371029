"""Checkpoints: other numbers of ranks, torch.distributed.checkpoint, older layouts.

``python3 -m tutel.checkpoint.gather``, ``.scatter`` and ``.inspect`` are command lines of their own.
"""

from typing import TYPE_CHECKING, Any

from tutel.checkpoint.convert import gather_files, scatter_file
from tutel.checkpoint.errors import CheckpointError
from tutel.checkpoint.gathering import gather_states
from tutel.checkpoint.inspection import FileSummary, LayerSummary, TensorSummary, inspect_file
from tutel.checkpoint.layouts import legacy_state_dict, load_legacy_state_dict
from tutel.checkpoint.scattering import scatter_state

if TYPE_CHECKING:
    from tutel.checkpoint.sharded import (
        load_sharded_optimizer_state_dict,
        load_sharded_state_dict,
        sharded_optimizer_state_dict,
        sharded_state_dict,
    )

__all__ = [
    "CheckpointError",
    "FileSummary",
    "LayerSummary",
    "TensorSummary",
    "gather_files",
    "gather_states",
    "inspect_file",
    "legacy_state_dict",
    "load_legacy_state_dict",
    "load_sharded_optimizer_state_dict",
    "load_sharded_state_dict",
    "scatter_file",
    "scatter_state",
    "sharded_optimizer_state_dict",
    "sharded_state_dict",
]


def __getattr__(name: str) -> Any:
    """Import what needs torch.distributed.checkpoint when it is asked for: that takes a second."""
    if "sharded" not in name or name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from tutel.checkpoint import sharded

    return getattr(sharded, name)
