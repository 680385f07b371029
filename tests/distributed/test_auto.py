"""``parallel_type='auto'`` over four ranks in two nodes: the links decide, all ranks alike, and the result stays."""

import os

import pytest
import torch
from ranks import run_ranks

from tutel import moe, net

RATE = "rate=1e12"


def choose(links, compared, tokens_of_ranks):
    rank = net.get_world_rank()
    os.environ |= {
        "LOCAL_RANK": str(rank % 2),
        "LOCAL_WORLD_SIZE": "2",
        "TUTEL_LINKS": links,
        "TUTEL_CHECK_RANKS": compared,
    }
    torch.set_default_dtype(torch.float64)
    layer = moe.moe_layer(
        {"type": "top", "k": 1, "capacity_factor": 0.0},
        8,
        {"type": "ffn", "count_per_node": -2, "hidden_size_per_expert": 128},
        seeds=(1, 1, 1),
        parallel_type="auto",
    )
    tokens = torch.randn(tokens_of_ranks[rank], 8)
    output = layer(tokens, inequivalent_tokens=True)
    chosen = layer.adaptive_degree
    others = [layer(tokens, inequivalent_tokens=True, adaptive_r=r) for r in layer.valid_rs]
    difference = max(float((output - other).abs().max()) for other in others) if len(tokens) else 0.0
    return chosen, difference, layer.valid_rs


@pytest.mark.parametrize(
    ("links", "compared", "degree"),
    [
        # An expert's ranks share a node: weights are gathered there, and rows cross once.
        (f"intra=1e12,inter=1e6,latency=0,{RATE}", "1", 1),
        # Of equal links, few rows cost less than weights.
        (f"intra=1e9,inter=1e9,latency=0,{RATE}", "1", 2),
        # Messages alone count: a gather of each of two parameters has fewest, unless ranks compare what they bring.
        (f"intra=1e12,inter=1e12,latency=1,{RATE}", "0", 0),
        (f"intra=1e12,inter=1e12,latency=1,{RATE}", "1", 2),
    ],
)
def test_links_decide(links, compared, degree):
    results = run_ranks(choose, 4, links, compared, (16, 3, 0, 9))
    assert [chosen for chosen, _, _ in results] == [degree] * 4
    assert max(difference for _, difference, _ in results) < 1e-14
    assert results[0][2] == [0, 1, 2]
