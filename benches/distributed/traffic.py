"""What collectives send: every call of torch.distributed is looked at, and its bytes to other ranks are added up."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

from torch import Tensor, distributed


@dataclass
class Traffic:
    """Bytes that this rank sends to others.

    Attributes:
        rows: In exchanges of floating-point rows.
        numbers: In exchanges of integers: counts and settings.
        weights: In all-gathers, and in reductions that are scattered.
        calls: Collectives of all kinds.
    """

    rows: int = 0
    numbers: int = 0
    weights: int = 0
    calls: int = 0


@contextmanager
def watch() -> Iterator[Traffic]:
    """Count while the block runs."""
    traffic = Traffic()
    exchange, gather = distributed.all_to_all_single, distributed.all_gather_into_tensor
    scatter = distributed.reduce_scatter_tensor

    def all_to_all_single(
        output: Tensor,
        input: Tensor,  # noqa: A002
        receives: Any = None,
        sends: Any = None,
        **options: Any,
    ) -> Any:
        group = options.get("group")
        ranks, me = distributed.get_world_size(group), distributed.get_rank(group)
        own = input.shape[0] // ranks if sends is None else sends[me]
        sent = input.numel() * input.element_size()
        if input.shape[0]:
            sent -= own * sent // input.shape[0]
        if input.is_floating_point() or input.element_size() < 8:
            traffic.rows += sent
        else:
            traffic.numbers += sent
        traffic.calls += 1
        return exchange(output, input, receives, sends, **options)

    def all_gather_into_tensor(output: Tensor, input: Tensor, *more: Any, **options: Any) -> Any:  # noqa: A002
        # As a ring sends it on: everything but one part.
        traffic.weights += (output.numel() - input.numel()) * input.element_size()
        traffic.calls += 1
        return gather(output, input, *more, **options)

    def reduce_scatter_tensor(output: Tensor, input: Tensor, *more: Any, **options: Any) -> Any:  # noqa: A002
        traffic.weights += (input.numel() - output.numel()) * input.element_size()
        traffic.calls += 1
        return scatter(output, input, *more, **options)

    with mock.patch.multiple(
        distributed,
        all_to_all_single=all_to_all_single,
        all_gather_into_tensor=all_gather_into_tensor,
        reduce_scatter_tensor=reduce_scatter_tensor,
    ):
        yield traffic
