"""The cost model against simulations that move each message by itself, and the degree that it chooses."""

import dataclasses
import itertools
import random

import pytest
from tutel.distributed.cost import Links, Sizes, choose_degree, cost, valid_degrees

LINKS = Links(intra=64.0, inter=16.0, latency_intra=0.5, latency_inter=3.0, node_size=4, rate=1e3)


def sizes_of(ranks=16, experts=4, **fields):
    given = {"tokens": 32, "model_dim": 6, "hidden": 10, "output_dim": 6, "top_k": 2, "element_size": 4}
    given["biases"] = False
    return Sizes(num_experts=experts, world_size=ranks, **{**given, **fields})


class Traffic:
    """Messages of one rank, added up one by one."""

    def __init__(self, links):
        self.links = links
        self.bytes = self.seconds = self.messages = 0

    def send(self, source, target, size):
        if source == target:
            return
        within = source // self.links.node_size == target // self.links.node_size
        latency = self.links.latency_intra if within else self.links.latency_inter
        self.bytes += size
        self.messages += 1
        self.seconds += latency + size / (self.links.intra if within else self.links.inter)


def direct(ranks, links, size, rank):
    """Send each of the other ranks its part."""
    traffic = Traffic(links)
    for target in range(ranks):
        traffic.send(rank, target, size / ranks)
    return traffic


def staged(ranks, links, size, rank):
    """Carry parts, each with its source and its target, inside nodes first and then across."""
    m = min(links.node_size, ranks)
    held = {source: [(source, target) for target in range(ranks)] for source in range(ranks)}
    traffic = Traffic(links)

    def move(peers, next_stop):
        arriving = {each: [] for each in range(ranks)}
        for holder, parts in held.items():
            for peer in peers(holder):
                carried = [part for part in parts if next_stop(holder, part) == peer]
                arriving[peer] += carried
                if holder == rank:
                    traffic.send(holder, peer, len(carried) * size / ranks)
        return arriving

    held = move(lambda at: range(at // m * m, at // m * m + m), lambda at, part: at // m * m + part[1] % m)
    held = move(lambda at: range(at % m, ranks, m), lambda at, part: part[1])
    assert all(target == at for at, parts in held.items() for _, target in parts)
    assert all(len(parts) == ranks for parts in held.values())
    return traffic


@pytest.mark.parametrize(("hierarchical", "simulate"), [(False, direct), (True, staged)])
@pytest.mark.parametrize("ranks", [1, 4, 8, 16])
def test_rows_are_exchanged_as_a_simulation_does(ranks, hierarchical, simulate):
    sizes = sizes_of(ranks, ranks, output_dim=9, top_k=1)
    found = cost(sizes, LINKS, 1, training=False, hierarchical=hierarchical)
    for rank in range(ranks):
        parts = [
            simulate(ranks, LINKS, size, rank)
            for size in (8 * ranks, 4 * sizes.rows * sizes.model_dim, 4 * sizes.rows * sizes.output_dim)
        ]
        assert found.messages == sum(part.messages for part in parts)
        assert found.bytes_tokens == pytest.approx(sum(part.bytes for part in parts))
        assert found.seconds_exchange == pytest.approx(sum(part.seconds for part in parts))


def test_hierarchical_messages_are_few_and_bytes_at_most_twice():
    sizes = sizes_of(4096, 4096, top_k=1)
    links = dataclasses.replace(LINKS, node_size=8)
    flat, staged_cost = (cost(sizes, links, 1, training=False, hierarchical=flag) for flag in (False, True))
    assert flat.messages == 3 * 4095
    assert staged_cost.messages == 3 * (7 + 511)
    assert flat.bytes_tokens < staged_cost.bytes_tokens <= 2 * flat.bytes_tokens


def test_hierarchical_means_nothing_inside_one_node_or_on_nodes_of_one():
    for ranks, node_size in [(4, 4), (4, 8), (6, 1), (6, 4)]:
        sizes, links = sizes_of(ranks, ranks, top_k=1), dataclasses.replace(LINKS, node_size=node_size)
        assert cost(sizes, links, 1, training=True, hierarchical=True) == cost(sizes, links, 1, training=True)


def ring(members, links, part):
    """Pass parts around until all members have all; return what each sent and how long the slowest step was, summed."""
    held = [{index} for index in range(len(members))]
    moving = list(range(len(members)))
    steps, seconds = 0, 0.0
    nodes = [member // links.node_size for member in members]
    per_node = min(map(nodes.count, nodes))
    while not all(len(parts) == len(members) for parts in held):
        times = []
        for index, member in enumerate(members):
            after = members[(index + 1) % len(members)]
            within = member // links.node_size == after // links.node_size
            # The only link that leaves a node has what all of the node's members have together.
            bandwidth = links.intra if within else min(links.intra, per_node * links.inter)
            kind = "intra" if within else "inter"
            step = getattr(links, f"step_{kind}")
            times.append((getattr(links, f"latency_{kind}") if step is None else step, part / bandwidth))
        moving = [moving[index - 1] for index in range(len(members))]
        for index, arrived in enumerate(moving):
            held[index].add(arrived)
        steps += 1
        seconds += max(latency for latency, _ in times) + max(bytes_ for _, bytes_ in times)
    return steps, seconds


@pytest.mark.parametrize("ranks", [1, 2, 4, 8, 12])
@pytest.mark.parametrize("local", [1, 3])
def test_weights_of_all_ranks_are_gathered_in_a_ring(ranks, local):
    sizes = sizes_of(ranks, ranks * local, top_k=1)
    part = local * 6 * 10 * 4
    steps, seconds = ring(list(range(ranks)), LINKS, part)
    found = cost(sizes, LINKS, 0, training=False)
    # Two matrices of one size, one after the other.
    assert (found.messages, found.bytes_weights, found.bytes_tokens) == (2 * steps, 2 * steps * part, 0)
    assert found.seconds_exchange == pytest.approx(2 * seconds)
    assert cost(sizes, LINKS, 0, training=True).bytes_weights == 4 * steps * part


@pytest.mark.parametrize("node_size", [1, 2, 4, 8, 16, 6])
@pytest.mark.parametrize("r", [1, 2, 4, 8])
@pytest.mark.parametrize("compares", [False, True])
def test_shards_are_gathered_from_neighbours(r, node_size, compares):
    """Of the blocks of neighbours, the slowest counts."""
    sizes, links = (
        sizes_of(16, 2, biases=True, output_dim=14),
        dataclasses.replace(LINKS, node_size=node_size, compares=compares),
    )
    if 16 % node_size:
        links = dataclasses.replace(links, node_size=1)
    alone = dataclasses.replace(sizes, tokens=0)
    found = cost(alone, links, r, training=False)
    counts = direct(16, links, 8 * 16, 0)
    empty = [direct(16, links, 0, 0)] * 2
    hidden = [4 * elements / 8 for elements in (6 * 10, 10 * 14, 10)]
    rings = [(8 // r, part) for part in hidden] + [(8, 4 * 14 / 8)]
    if compares:
        rings += [(size, 128) for size, _ in rings]
    slowest = [
        max(
            (ring(list(range(first, first + size)), links, part) for first in range(0, 16, size)),
            key=lambda run: run[1],
        )
        for size, part in rings
    ]
    assert found.messages == sum(steps for steps, _ in slowest) + sum(sent.messages for sent in [counts, *empty])
    assert found.bytes_weights == sum(steps * part for (steps, _), (_, part) in zip(slowest, rings, strict=True))
    assert found.seconds_exchange == pytest.approx(
        sum(seconds for _, seconds in slowest) + sum(sent.seconds for sent in [counts, *empty])
    )


@pytest.mark.parametrize("r", [1, 2, 4])
def test_bytes_of_each_degree_between(r):
    sizes = sizes_of(16, 4, hidden=8)
    found = cost(sizes, LINKS, r, training=True)
    shard = (6 * 8 + 8 * 6) * 4 / 4
    assert found.bytes_weights == 2 * (4 / r - 1) * shard
    rows = 32 * 2 * (6 + 6) * 4 * 15 / 16
    assert found.bytes_tokens == 2 * r * rows + 8 * 15
    assert found.seconds_compute == pytest.approx(3 * 2 * 64 * (6 * 8 + 8 * 6) / 1e3)


def test_rows_may_be_narrower_while_they_travel():
    wide, narrow = (cost(sizes_of(wire_size=size), LINKS, 2, training=True) for size in (None, 1))
    told = 8 * 15
    assert wide.bytes_tokens - told == 4 * (narrow.bytes_tokens - told)
    assert wide.bytes_weights == narrow.bytes_weights


# -- overlap --------------------------------------------------------------------------------------------------------


def shortest_schedule(chunks, come, compute, go):
    """The least time of any order in which one link sends and one processor computes, chunk by chunk."""
    best = float("inf")
    for order in set(itertools.permutations("s" * chunks + "r" * chunks)):
        link = processor = 0.0
        arrived, computed = [], []
        sent_back = 0
        for act in order:
            if act == "s":
                link += come
                arrived.append(link)
                processor = max(processor, link) + compute / chunks
                computed.append(processor)
            elif sent_back == len(computed):
                break
            else:
                link = max(link, computed[sent_back]) + go
                sent_back += 1
        else:
            best = min(best, link)
    return best


@pytest.mark.parametrize("chunks", [1, 2, 3, 4])
@pytest.mark.parametrize("rate", [20.0, 200.0, 2000.0, 2e6])
def test_overlap_is_what_the_best_schedule_reaches(chunks, rate):
    sizes, links = sizes_of(8, 8, output_dim=12), dataclasses.replace(LINKS, rate=rate)
    found = cost(sizes, links, 1, training=False, overlap_degree=chunks)
    counts = direct(8, links, 8 * 8 * chunks, 0).seconds
    come, go = (direct(8, links, 4 * sizes.rows * width / chunks, 0).seconds for width in (6, 12))
    best = counts + shortest_schedule(chunks, come, found.seconds_compute, go)
    assert found.seconds_total <= best * (1 + 1e-12)
    assert best <= found.seconds_total + found.seconds_compute / chunks
    if chunks == 1:
        assert found.seconds_total == pytest.approx(best)
    assert found.messages == 7 * (1 + 2 * chunks)


def test_overlap_hides_what_is_shorter_and_costs_messages():
    sizes = sizes_of(16, 16, tokens=1_000_000)
    links = dataclasses.replace(LINKS, latency_intra=0.0, latency_inter=0.0)
    links = dataclasses.replace(links, rate=2 * sizes.rows * sizes.expert_weights / 20_000_000)
    totals = [cost(sizes, links, 1, training=True, overlap_degree=d).seconds_total for d in (1, 2, 4, 64)]
    assert totals == sorted(totals, reverse=True)
    whole = cost(sizes, links, 1, training=True)
    assert whole.seconds_total == pytest.approx(whole.seconds_exchange + whole.seconds_compute)
    assert totals[-1] < 1.02 * max(whole.seconds_exchange, whole.seconds_compute)
    slow_to_start = dataclasses.replace(links, latency_intra=1e6, latency_inter=1e6)
    totals = [cost(sizes, slow_to_start, 1, training=True, overlap_degree=d).seconds_total for d in (1, 2, 4)]
    assert totals == sorted(totals)


# -- choosing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "degree"),
    [
        # Weights of an expert are eight times its rows: they stay where they are.
        ({}, 4),
        # Rows cross nodes, an expert's weights do not: rows are sent once.
        ({"inter": 1e6}, 1),
        # All that counts is the number of messages: one ring forward and one backward.
        ({"latency_intra": 1.0, "latency_inter": 1.0}, 0),
    ],
)
def test_other_links_another_degree(changed, degree):
    sizes = sizes_of(8, 2, tokens=256, model_dim=64, hidden=4096, output_dim=64)
    links = Links(intra=1e8, inter=1e8, latency_intra=0.0, latency_inter=0.0, node_size=4, rate=1e12)
    degrees = valid_degrees(sizes.shards)
    assert degrees == [0, 1, 2, 4]
    assert choose_degree(sizes, dataclasses.replace(links, **changed), degrees, True) == degree


def test_many_rows_another_degree_than_few():
    links = Links(intra=1e8, inter=1e8, latency_intra=1e-6, latency_inter=1e-6, node_size=8, rate=1e12)
    sizes = sizes_of(8, 2, model_dim=64, hidden=4096, output_dim=64)
    chosen = [
        choose_degree(dataclasses.replace(sizes, tokens=tokens), links, [0, 1, 2, 4], True)
        for tokens in (1, 100, 600, 1500, 10**6)
    ]
    assert chosen == [4, 4, 2, 1, 0]


def test_the_least_is_chosen_and_ties_go_to_the_smaller():
    draw = random.Random(5)
    for _ in range(300):
        experts, n = draw.choice([1, 2, 3, 8]), draw.choice([1, 2, 4, 6])
        sizes = sizes_of(experts * n, experts, top_k=1, tokens=draw.randrange(0, 5000), hidden=draw.randrange(1, 3000))
        links = Links(*(10 ** draw.uniform(3, 9) for _ in range(2)), *(10 ** draw.uniform(-7, -1) for _ in range(2)),
                      node_size=draw.choice([1, 2, 4]), rate=1e9)  # fmt: skip
        degrees = valid_degrees(n)
        training = draw.random() < 0.5
        chosen = choose_degree(sizes, links, draw.sample(degrees, len(degrees)), training)
        seconds = {r: cost(sizes, links, r, training=training).seconds_total for r in degrees}
        assert chosen == min(r for r in degrees if seconds[r] == min(seconds.values()))
    assert choose_degree(sizes_of(1, 1, top_k=1), LINKS, [1, 0], True) == 0


def test_no_rank_but_one_costs_no_exchange():
    found = cost(sizes_of(1, 2), LINKS, 1, training=True)
    assert (found.messages, found.bytes_tokens, found.bytes_weights, found.seconds_exchange) == (0, 0, 0, 0)
    assert found.seconds_total == found.seconds_compute > 0


def test_no_tokens():
    found = cost(sizes_of(tokens=0), LINKS, 4, training=True)
    assert (found.seconds_compute, found.bytes_tokens) == (0, 8 * 15)


# -- rows and memory ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factor", "rows"), [(0.0, 200), (1.0, 2 * 8 * 13), (0.5, 2 * 8 * 6), (-0.5, 2 * 8 * 6), (2.0, 200)]
)
def test_rows_kept(factor, rows):
    """T = 100, E = 8, K = 2: a rank's choices of an expert are limited to 2 int(f 13)."""
    assert sizes_of(8, 8, tokens=100, capacity_factor=factor).rows == min(200, rows)


def test_memory():
    sizes = sizes_of(16, 4, hidden=8)
    whole = (6 * 8 + 8 * 6) * 4
    rows = 4 * 64
    kept = 4 * 32 * 12 + rows * 8
    memory = {r: cost(sizes, LINKS, r, training=False).memory for r in (0, 1, 2, 4)}
    assert memory == {
        0: whole / 4 + 4 * whole + kept + rows * 12,
        1: whole / 4 + whole + kept + rows * 24,
        2: whole / 4 + whole / 2 + kept + rows * 48,
        4: whole / 4 + kept + rows * 96,
    }
    assert cost(sizes, LINKS, 0, training=True).memory - memory[0] == whole / 4 + 4 * whole
    assert cost(sizes, LINKS, 4, training=False, hierarchical=True).memory - memory[4] == 4 * rows * 6


# -- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"tokens": -1}, "tokens must be at least 0, got -1"),
        ({"hidden": 0}, "hidden must be at least 1, got 0"),
        ({"top_k": 5}, r"top_k must be at most num_experts \(4\), got 5"),
        ({"experts": 6}, r"num_experts must divide world_size \(16\) or be a multiple of it, got 6"),
        ({"capacity_factor": float("nan")}, "capacity_factor must be finite, got nan"),
        ({"matrices": 1}, "matrices must be at least 2, got 1"),
        ({"wire_size": 0}, "wire_size must be above 0, got 0"),
    ],
)
def test_sizes_are_checked(fields, text):
    with pytest.raises(ValueError, match=text):
        sizes_of(**fields)


def test_links_are_checked():
    with pytest.raises(ValueError, match="inter must be above 0, got 0"):
        dataclasses.replace(LINKS, inter=0)
    with pytest.raises(ValueError, match=r"latency_intra must be at least 0, got -1.0"):
        dataclasses.replace(LINKS, latency_intra=-1.0)
    with pytest.raises(ValueError, match=r"step_inter must be at least 0, got -1"):
        dataclasses.replace(LINKS, step_inter=-1)
    with pytest.raises(TypeError, match="rate must be a number, got 'fast'"):
        dataclasses.replace(LINKS, rate="fast")


def test_degrees_are_checked():
    with pytest.raises(ValueError, match="degree must be 0, 1, 2 or 4, got 3"):
        cost(sizes_of(), LINKS, 3, training=True)
    with pytest.raises(ValueError, match="overlap_degree must be at least 1, got 0"):
        cost(sizes_of(), LINKS, 1, training=True, overlap_degree=0)
    with pytest.raises(ValueError, match="valid_rs must hold at least one degree, got none"):
        choose_degree(sizes_of(), LINKS, [], True)
