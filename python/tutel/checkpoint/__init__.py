"""Checkpoints: other numbers of ranks, torch.distributed.checkpoint, older layouts.

``python3 -m tutel.checkpoint.gather``, ``.scatter`` and ``.inspect`` are command lines of their own.
"""

from tutel.checkpoint.convert import gather_files, scatter_file
from tutel.checkpoint.errors import CheckpointError
from tutel.checkpoint.gathering import gather_states
from tutel.checkpoint.layouts import legacy_state_dict, load_legacy_state_dict
from tutel.checkpoint.scattering import scatter_state

__all__ = [
    "CheckpointError",
    "gather_files",
    "gather_states",
    "legacy_state_dict",
    "load_legacy_state_dict",
    "scatter_file",
    "scatter_state",
]
