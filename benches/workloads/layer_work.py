"""What a layer cannot do without, inference and training, and how many experts' weights its inputs touch."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from benches.floors import FRESH_FROM, Work


def forward_work(
    dtype: torch.dtype, *, tokens: int, top_k: int, width: int, hidden: int, matrices: int, touched: float
) -> Work:
    """Work of one forward pass: ``matrices`` [D, H] an expert; the touched ones are read once.

    ``touched`` is the number of experts that have rows, the mean over the inputs where several are taken in turn.
    """
    matrix = width * hidden
    output = tokens * width * dtype.itemsize
    return Work(
        dtype,
        flops=2 * matrices * tokens * top_k * matrix,
        read=int(matrices * matrix * dtype.itemsize * touched),
        moved=2 * output,
        fresh=output if output >= FRESH_FROM else 0,
    )


def step_work(
    dtype: torch.dtype, *, tokens: int, top_k: int, width: int, hidden: int, experts: int, matrices: int, touched: float
) -> Work:
    """Work of a forward and a backward pass that gives gradients of the input and of all weights."""
    matrix = width * hidden
    weights = matrices * matrix * dtype.itemsize
    values = tokens * width * dtype.itemsize
    # A gradient is a tensor a matrix of all experts; those of experts without rows are zeros that have to be written.
    gradient = experts * matrix * dtype.itemsize
    return Work(
        dtype,
        flops=3 * 2 * matrices * tokens * top_k * matrix,
        read=int(2 * weights * touched),
        moved=4 * values + experts * weights,
        fresh=matrices * gradient if gradient >= FRESH_FROM else 0,
    )


@torch.no_grad()
def experts_touched(layer: nn.Module, inputs: Iterable[Tensor]) -> float:
    """Return the mean number of experts that have rows."""
    touched = []
    for tokens in inputs:
        layer(tokens)
        counts = layer.dispatch_count
        assert isinstance(counts, Tensor)
        touched.append(int((counts > 0).sum()))
    return sum(touched) / len(touched)


def without_ties(tokens: Tensor, logits: Tensor, top_k: int, count: int) -> Tensor:
    """Return ``count`` tokens [count, D] of which the choice of experts is beyond doubt.

    In bf16 the k-th and the next logit are often equal, or within the rounding of one product: whom a token then
    chooses is each implementation's own affair, and no result could be compared.

    Raises:
        ValueError: If too few tokens qualify.
    """
    if logits.shape[1] > top_k:
        ordered = logits.double().topk(top_k + 1, dim=1).values
        # Some units in the last place of the larger one, and half of one for fp32's sake where it is near zero.
        margin = 4 * torch.finfo(logits.dtype).eps * ordered[:, top_k - 1].abs().clamp(min=0.5)
        tokens = tokens[ordered[:, top_k - 1] - ordered[:, top_k] > margin]
    if tokens.shape[0] < count:
        raise ValueError(f"only {tokens.shape[0]} tokens choose without doubt, {count} are needed")
    return tokens[:count]
