"""One run: everything that is measured with one number of ranks, in one set of processes."""

import time
from dataclasses import dataclass
from typing import Any

import torch
from tutel.distributed.cost import Links
from tutel.distributed.links import measured_links

from benches.distributed import layers, raw
from benches.distributed.layers import Compared, Modes, Sent, Shape
from benches.distributed.sampling import FULL, QUICK, Effort
from tutel import net


@dataclass(frozen=True)
class Found:
    """What was measured over W ranks."""

    ranks: int
    threads: int
    links: Links
    bare: list[raw.Bare]
    sent: list[Sent]
    exchange: list[Compared]
    overlap: Compared
    switching: list[Compared]
    modes: list[Modes]
    #: Processor time of this rank.
    cpu_seconds: float = 0.0


def shapes(ranks: int) -> list[Shape]:
    """Layers whose modes are compared: rows are most of what moves, weights are, or neither."""
    shards = sorted({2, ranks})
    return [
        Shape(tokens, 256, hidden, -n, 1) for n in shards for tokens, hidden in [(2048, 256), (256, 1024), (16, 4096)]
    ]


def measure(quick: bool) -> Found:
    """Measure on this rank; all ranks of the world call this."""
    effort, started = QUICK if quick else FULL, time.process_time()
    fewer = Effort(effort.rounds if quick else 20, effort.sample_seconds)
    ranks = net.get_world_size()
    links = measured_links()
    told: dict[str, Any] = {"ranks": ranks, "threads": torch.get_num_threads(), "links": links}
    layer_shapes = shapes(ranks)
    return Found(
        **told,
        bare=raw.measure(links, effort),
        sent=layers.sent_bytes(),
        exchange=layers.against_bare(effort),
        overlap=layers.overlap(fewer),
        switching=[layers.switching(shape, fewer) for shape in layer_shapes[1:3]],
        modes=[layers.modes(shape, links, fewer) for shape in layer_shapes],
        cpu_seconds=time.process_time() - started,
    )
