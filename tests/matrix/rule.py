"""The error rule for whole layers: that of reference.assert_close, with a floor for a chain of stages."""

import torch
from reference import accumulator

#: Free roundings in the accumulator's dtype: a layer is a chain of about ten stages, forward and back.
STAGES = 10
#: Free roundings in the result's dtype, for there a user's modules, and their gradients, round several times.
ROUNDINGS = 3
#: Of gradients of a cosine gate: sums of terms larger than themselves, behind two normalisations and two products.
COSINE_ROUNDINGS = 8


def assert_close(what, ours, naive, exact):
    """|ours - exact| <= 2 * |naive - exact|, the largest error over all elements.

    The naive twin may be lucky (and in fp64 it is the reference itself), so the roundings above, and 64 of fp64, of
    the largest value (of 1 if all are smaller) are free.
    """
    assert ours.dtype == naive.dtype, what
    assert ours.shape == naive.shape == exact.shape, what
    if ours.numel() == 0:
        return
    own, summed = torch.finfo(ours.dtype).eps, torch.finfo(accumulator(ours.dtype)).eps
    cosine = any(name in what for name in ("temperature", "sim_matrix", "cosine_projector"))
    free = max((COSINE_ROUNDINGS if cosine else ROUNDINGS) * own, STAGES * summed, 64 * torch.finfo(torch.float64).eps)
    floor = max(exact.abs().max().item(), 1.0) * free
    error, twin = ((value.double() - exact).abs().max().item() for value in (ours, naive))
    assert error <= max(2 * twin, floor), f"{what}: error {error:.3e}, naive twin {twin:.3e}, floor {floor:.3e}"
