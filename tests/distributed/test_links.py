"""The speed of links as a group measures it: one answer for all ranks, which the environment can give instead."""

import os

import pytest
from ranks import run_ranks
from tutel.distributed.cost import Links, Sizes, choose_degree
from tutel.distributed.groups import divide
from tutel.distributed.links import measured_links

from tutel import net

TOLD = "intra=8e9,inter=2e9,latency=1e-5,rate=1e12"


def measure_in_nodes(local_size, told):
    """Measure in nodes of so many ranks, where each rank may have been told something of its own."""
    rank = net.get_world_rank()
    os.environ |= {"LOCAL_RANK": str(rank % local_size), "LOCAL_WORLD_SIZE": str(local_size)}
    if told[rank]:
        os.environ["TUTEL_LINKS"] = told[rank]
    links = measured_links()
    assert measured_links() is links
    # A group of its own has links of its own.
    neighbours = divide(2).neighbours
    assert measured_links(neighbours) is measured_links(neighbours)
    return vars(links), vars(measured_links(neighbours))


@pytest.mark.parametrize("local_size", [1, 2, 4])
def test_ranks_measure_the_same(local_size):
    results = run_ranks(measure_in_nodes, 4, local_size, [None] * 4)
    assert all(result[0] == results[0][0] for result in results)
    found = results[0][0]
    assert found["node_size"] == local_size
    # Anything between a slow disk and fast memory.
    assert 1e6 < found["intra"] < 1e12
    assert 1e6 < found["inter"] < 1e12
    assert 1e-8 < found["latency_intra"] < 1
    assert 1e-8 < found["latency_inter"] < 1
    assert 1e-8 < found["step_intra"] < 1
    assert 1e-8 < found["step_inter"] < 1
    assert 1e7 < found["rate"] < 1e16
    if local_size in (1, 4):
        assert found["intra"] == found["inter"]
        assert found["latency_intra"] == found["latency_inter"]
    # Neighbours agree with each other, not with the other block.
    assert results[0][1] == results[1][1]
    assert results[2][1] == results[3][1]
    assert results[0][1] != results[2][1]
    sizes = Sizes(64, 32, 64, 32, num_experts=2, top_k=1, world_size=4, element_size=4)
    assert choose_degree(sizes, Links(**found), [0, 1, 2], True) in (0, 1, 2)


def test_what_ranks_were_told_counts():
    results = run_ranks(measure_in_nodes, 4, 2, [TOLD] * 4)
    told = {"intra": 8e9, "inter": 2e9, "latency_intra": 1e-5, "latency_inter": 1e-5, "rate": 1e12}
    told |= {"step_intra": 1e-5, "step_inter": 1e-5, "node_size": 2, "compares": True}
    assert [result[0] for result in results] == [told] * 4


def test_ranks_that_were_told_different_things_agree_on_the_slowest():
    results = run_ranks(measure_in_nodes, 4, 2, [TOLD, TOLD.replace("2e9", "1e9"), "latency=0.5,rate=1e1", None])
    assert all(result[0] == results[0][0] for result in results)
    found = results[0][0]
    assert found["inter"] <= 1e9
    assert found["latency_inter"] == found["step_inter"] == 0.5
    assert found["rate"] == 10.0


def test_one_rank_has_nothing_to_measure(monkeypatch):
    monkeypatch.delenv("TUTEL_LINKS", raising=False)
    assert measured_links().node_size == 1
    monkeypatch.setenv("TUTEL_LINKS", TOLD)
    assert measured_links().inter == 2e9
    monkeypatch.setenv("TUTEL_LINKS", "fast")
    with pytest.raises(ValueError, match="environment variable TUTEL_LINKS must hold"):
        measured_links()
