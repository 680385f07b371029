"""Groups of several ranks: division, places, node sizes, and starting anew."""

import torch
from pytest import mark
from ranks import run_ranks
from torch import distributed
from tutel.distributed import groups

from tutel import net


def members(group):
    return distributed.get_process_group_ranks(group)


def sum_of_ranks(group):
    total = torch.tensor([float(distributed.get_rank())])
    distributed.all_reduce(total, group=group)
    return total.item()


def divide_all():
    rank, size = net.get_world_rank(), net.get_world_size()
    found = {}
    for block in [n for n in range(1, size + 1) if size % n == 0]:
        division = groups.divide(block)
        assert groups.divide(block) == division
        assert members(division.neighbours) == list(range(rank // block * block, rank // block * block + block))
        assert members(division.strided) == list(range(rank % block, size, block))
        found[block] = sum_of_ranks(division.neighbours), sum_of_ranks(division.strided)
    net.barrier()
    assert members(net.create_standalone_group()) == [rank]
    return found


@mark.parametrize("world_size", [2, 3, 4])
def test_every_division(world_size):
    results = run_ranks(divide_all, world_size)
    for rank, found in enumerate(results):
        for block, (neighbours, strided) in found.items():
            first = rank // block * block
            assert neighbours == sum(range(first, first + block))
            assert strided == sum(range(rank % block, world_size, block))
