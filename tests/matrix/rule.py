"""The error rule for whole layers: that of reference.assert_close, on the mean over several batches of tokens.

A layer is a chain of about ten rounded stages, forward and back; on one batch its error, or its naive twin's, may well
be a lucky one, above all where the result is a single number.
"""

import torch
from reference import accumulator

#: Batches of tokens whose errors are averaged.
BATCHES = 6


def error_of(found, exact):
    return (found.double() - exact).abs().max().item() if exact.numel() else 0.0


def assert_close(what, ours, naive, exact):
    """mean |ours - exact| <= 2 * mean |naive - exact|, the largest error over all elements of each batch.

    The naive twin may be lucky (and in fp64 it is the reference itself), so some roundings of the largest value (of 1
    if all are smaller) are free: one of the result's dtype, four of the accumulator's, 64 of fp64.

    Args:
        what: Names the result.
        ours: The result of each batch.
        naive: The twin's in the same dtype.
        exact: The twin's in fp64.
    """
    for left, right, truth in zip(ours, naive, exact, strict=True):
        assert left.dtype == right.dtype, what
        assert left.shape == right.shape == truth.shape, what
    own, summed = torch.finfo(ours[0].dtype).eps, torch.finfo(accumulator(ours[0].dtype)).eps
    largest = max(truth.abs().max().item() if truth.numel() else 0.0 for truth in exact)
    floor = max(largest, 1.0) * max(own, 4 * summed, 64 * torch.finfo(torch.float64).eps)
    error, twin = (sum(map(error_of, found, exact)) / len(exact) for found in (ours, naive))
    assert error <= max(2 * twin, floor), f"{what}: error {error:.3e}, naive twin {twin:.3e}, floor {floor:.3e}"
