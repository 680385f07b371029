"""A job's files as torch's tensors."""

import torch
from torch import Tensor

from benches.outside.protocol import Job

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def load(job: Job, name: str, *shape: int) -> Tensor:
    """Read a tensor, in the job's dtype."""
    stored = torch.frombuffer(bytearray(job.path(name).read_bytes()), dtype=torch.float32)
    return stored.view(shape).to(DTYPES[job.dtype])
