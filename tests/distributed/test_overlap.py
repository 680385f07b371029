"""With several chunks, rows of one travel while another is computed, forward and backward."""

from typing import Any

import pytest
import torch
from layer_twin import MODEL_DIM, Case, make_pair
from ranks import run_ranks
from tutel.distributed import exchange
from tutel.experts import ExpertWork
from tutel.functional.expert_ffn import _ExpertFFN

CHUNKS = 3


def trace() -> list[str]:
    """Run a layer; return what happened in order: rows set out, are waited for, experts compute."""
    layer, _ = make_pair(Case(1, layer={"a2a_ffn_overlap_degree": CHUNKS}))
    events: list[str] = []

    class Logged(exchange._Pending):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.number = sum(event.startswith("start") for event in events)
            events.append(f"start {self.number}")

        def wait(self) -> torch.Tensor:
            events.append(f"wait {self.number}")
            return super().wait()

    class Forward(ExpertWork):
        def compute(self, rows: Any) -> Any:
            events.append("compute")
            return super().compute(rows)

    backward = _ExpertFFN.backward

    def logged_backward(*args: Any) -> Any:
        events.append("compute")
        return backward(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exchange, "_Pending", Logged)
        patch.setattr("tutel.layer.ExpertWork", Forward)
        patch.setattr(_ExpertFFN, "backward", staticmethod(logged_backward))
        output = layer(torch.randn(30, MODEL_DIM, dtype=torch.float64, requires_grad=True))
        events.append("backward")
        output.sum().backward()
    return events


def test_rows_of_a_chunk_travel_while_another_is_computed() -> None:
    for events in run_ranks(trace, 2):
        half = events.index("backward")
        for phase in (events[:half], events[half + 1 :]):
            computed = [place for place, event in enumerate(phase) if event == "compute"]
            assert len(computed) == CHUNKS
            for number, place in enumerate(computed):
                started = {event.split()[1] for event in phase[:place] if event.startswith("start")}
                waited = {event.split()[1] for event in phase[:place] if event.startswith("wait")}
                travelling = started - waited
                # The chunks that are still to come, and those before, whose results are on their way back.
                assert len(travelling) == CHUNKS - 1, (number, phase)
