"""Groups of several ranks: division, places, node sizes, starting anew, and launchers."""

import os
import subprocess
import sys
from inspect import signature

import torch
from pytest import mark, raises
from ranks import free_port, printed, run_ranks
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from tutel.distributed import destroy_group, groups, kept, node_size

from tutel import moe, net, system


def members(group):
    return distributed.get_process_group_ranks(group)


def sum_of_ranks(group):
    total = torch.tensor([float(distributed.get_rank())])
    distributed.all_reduce(total, group=group)
    return total.item()


def divide_all():
    rank, size = net.get_world_rank(), net.get_world_size()
    for block in [n for n in range(1, size + 1) if size % n == 0]:
        division = groups.divide(block)
        again = groups.divide(block)
        assert (again.neighbours, again.strided) == (division.neighbours, division.strided)
        first = rank // block * block
        neighbours, strided = [*range(first, first + block)], [*range(rank % block, size, block)]
        assert members(division.neighbours) == neighbours
        assert members(division.strided) == strided
        assert sum_of_ranks(division.neighbours) == sum(neighbours)
        assert sum_of_ranks(division.strided) == sum(strided)
        place = net.create_groups_from_world(size // block)
        assert net.create_groups_from_world(-block) is place
        assert (place.group_count, place.model_size, place.global_size) == (size // block, block, size)
        assert (place.data_rank, place.model_rank, place.global_rank) == (rank // block, rank % block, rank)
        assert (members(place.model_group), members(place.data_group)) == (neighbours, strided)
        assert place.is_distributed
        assert place.local_device == torch.device("cpu")
    assert groups.divide(size).neighbours is None
    assert groups.divide(1).strided is None
    assert members(net.create_standalone_group()) == [rank]
    with raises(ValueError, match=rf"size must divide the number of ranks \({size}\), got {size + 1}"):
        groups.divide(size + 1)
    session = system.init_data_model_parallel(group_count=size, backend="gloo")  # a second time
    assert session.data_rank == system.init_data_model_parallel.data_rank == rank
    net.barrier()


@mark.parametrize("world_size", [2, 3, 4])
def test_every_division(world_size):
    run_ranks(divide_all, world_size)


def divide_a_part():
    """Ranks 1 to 3 divide themselves, and rank 0 need not know."""
    rank = net.get_world_rank()
    part = distributed.new_group([1, 2, 3])
    if rank == 0:
        with raises(ValueError, match=r"this rank \(0\) is no member of the group"):
            net.get_world_size(part)
        return None
    assert (net.get_world_size(part), net.get_world_rank(part)) == (3, rank - 1)
    alone, strided = groups.divide(1, part)
    assert members(alone) == [rank]
    assert strided is part
    assert groups.divide(3, part).neighbours is part
    place = net.create_groups_from_world(-1, parent_group=part)
    assert (place.global_rank, place.global_size, place.data_rank) == (rank - 1, 3, rank - 1)
    net.barrier(part)
    return sum_of_ranks(place.data_group)


def test_division_of_a_subgroup():
    assert run_ranks(divide_a_part, 4) == [None, 6.0, 6.0, 6.0]


def divide_after_different_histories():
    """What a rank made before does not matter: not by itself, not with others, not what is gone."""
    rank = net.get_world_rank()
    pair = distributed.new_group([0, 1])
    low = [0, 1, 2]
    part = distributed.new_group(low)
    if rank < 2:
        net.create_groups_from_world(-1, parent_group=pair)
    if rank in low:
        # Rank 2 made no group of the pair's, and is none of its members.
        assert members(groups.divide(1, part).neighbours) == [rank]
    # A program's own groups, which all ranks make together as torch asks, find each other as before.
    again = distributed.new_group(low)
    if rank in low:
        assert sum_of_ranks(again) == sum(low)
    if rank == 0:
        distributed.new_group([0], use_local_synchronization=True)
    if rank == 3:
        distributed.destroy_process_group(distributed.new_group([3], use_local_synchronization=True))
    place = net.create_groups_from_world(2)
    assert members(place.model_group) == [rank // 2 * 2, rank // 2 * 2 + 1]
    return [sum_of_ranks(place.model_group), sum_of_ranks(place.data_group)]


def test_division_after_different_histories():
    totals = run_ranks(divide_after_different_histories, 4, env={"TUTEL_GLOBAL_TIMEOUT_SEC": "10"})
    assert totals == [[1.0, 2.0], [1.0, 4.0], [5.0, 2.0], [5.0, 4.0]]


def divide_a_group_in_other_order():
    """Blocks are of neighbours in the group, whatever their numbers among all."""
    order = [3, 0, 2, 1]
    part = distributed.new_group(order, sort_ranks=False)
    place = net.create_groups_from_world(-2, parent_group=part)
    return members(place.model_group), members(place.data_group), place.model_rank


@mark.skipif("sort_ranks" not in signature(distributed.new_group).parameters, reason="this torch sorts a group's ranks")
def test_division_of_a_group_in_other_order():
    left, right, even, odd = [3, 0], [2, 1], [3, 2], [0, 1]
    expected = [(left, odd, 1), (right, odd, 1), (right, even, 0), (left, even, 0)]
    assert run_ranks(divide_a_group_in_other_order, 4) == expected


def count_groups():
    return len(distributed.distributed_c10d._world.pg_names)


def make_and_destroy():
    """A group's divisions, and theirs, end with it; however it is destroyed."""
    rank = net.get_world_rank()
    kept_of_all = groups.divide(2).neighbours
    before = count_groups(), len(kept._made), len(kept._children)
    for destroy in (destroy_group, distributed.destroy_process_group):
        for _ in range(3):
            part = distributed.new_group([0, 1, 2, 3])
            place = net.create_groups_from_world(2, parent_group=part)
            assert members(groups.divide(1, place.model_group).neighbours) == [rank]
            assert node_size(place.data_group) == 2
            distributed.destroy_process_group(groups.divide(1, part).neighbours)  # the program's doing
            assert count_groups() == before[0] + 4
            destroy(part)
            for use in (lambda: groups.divide(2, part), lambda: destroy_group(part)):  # noqa: B023
                with raises(ValueError, match=r"there is no group .* it was destroyed"):
                    use()
            # What torch's own function left has gone with the next question.
            assert (count_groups(), len(kept._made), len(kept._children)) == before
    assert groups.divide(2).neighbours is kept_of_all
    assert sum_of_ranks(kept_of_all) == [1.0, 1.0, 5.0, 5.0][rank]
    others = distributed.new_group([0, 1])
    destroy_group(others)  # nothing where this rank is no member
    assert count_groups() == before[0]
    for group in (None, distributed.group.WORLD):
        with raises(ValueError, match="group must be a part of all ranks"):
            destroy_group(group)
    net.barrier()


def test_divisions_end_with_their_group():
    run_ranks(make_and_destroy, 4)


def give_what_is_no_group():
    mesh = init_device_mesh("cpu", (2,))
    assert sum_of_ranks(groups.divide(1, mesh.get_group()).strided) == 1.0
    expected = r"group must be a process group of torch\.distributed or None, got DeviceMesh; pass mesh\.get_group\(\)"
    experts = {"type": "ffn", "hidden_size_per_expert": 8, "count_per_node": 1}
    uses = [
        lambda: net.get_world_size(mesh), lambda: net.get_world_rank(mesh), lambda: net.barrier(mesh),
        lambda: net.simple_all_reduce(torch.ones(2), group=mesh), lambda: node_size(mesh), lambda: destroy_group(mesh),
        lambda: moe.moe_layer({"type": "top"}, 4, experts, group=mesh),
        lambda: net.create_groups_from_world(1, parent_group=mesh),
    ]  # fmt: skip
    for use in uses:
        with raises(TypeError, match=expected):
            use()
    with raises(TypeError, match=r"parent must be a process group of torch\.distributed or None, got list$"):
        groups.divide(1, [0, 1])


def test_what_is_no_group_is_refused():
    run_ranks(give_what_is_no_group, 2)
    with raises(TypeError, match=r"group must be a process group of torch\.distributed or None, got int$"):
        net.get_world_size(3)


def begin_anew(store):
    """After a new start none of the old groups is given."""
    rank = net.get_world_rank()
    old = groups.divide(1).neighbours
    place = net.create_groups_from_world(1)
    groups.stop()
    assert not distributed.is_initialized()
    with raises(ValueError, match=r"torch\.distributed is not initialised"):
        net.get_world_size(old)
    assert groups.divide(1) == (None, None)
    for backend in ("gloo", "gloo"):
        os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
        again = system.init_data_model_parallel(backend=backend)
        assert again is not place
        assert groups.divide(1).neighbours is not old
        assert sum_of_ranks(None) == 1.0
        groups.stop()
    # A program that starts torch.distributed by itself.
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    assert sum_of_ranks(groups.divide(2).neighbours) == 1.0
    assert sum_of_ranks(groups.divide(1).neighbours) == rank
    net.barrier()
    distributed.destroy_process_group()


def test_starting_anew(tmp_path):
    run_ranks(begin_anew, 2, tmp_path / "store")


def nodes(layout):
    """Pretend that ranks are on hosts of these sizes."""
    rank = net.get_world_rank()
    first, host = 0, 0
    while first + layout[host] <= rank:
        first, host = first + layout[host], host + 1
    os.environ |= {"LOCAL_RANK": str(rank - first), "LOCAL_WORLD_SIZE": str(layout[host])}
    strided = groups.divide(2).strided  # before the sizes are known
    found = node_size(), node_size(strided), node_size(groups.divide(2).neighbours)
    kept._made.clear()
    return found


def all_nodes(layouts):
    return [nodes(layout) for layout in layouts]


def test_ranks_of_a_node():
    expected = {(4,): (4, 2, 2), (2, 2): (2, 1, 2), (1, 3): (1, 1, 1), (1, 1, 1, 1): (1, 1, 1), (3, 1): (1, 1, 1)}
    # Where hosts differ in size, pairs differ too: they have to agree only inside themselves.
    for rank, found in enumerate(run_ranks(all_nodes, 4, list(expected))):
        for (layout, sizes), got in zip(expected.items(), found, strict=True):
            assert got[0] == sizes[0], (layout, rank)
            if len(set(layout)) == 1:
                assert got == sizes, (layout, rank)


LAUNCHED = """
import os, sys, torch
from tutel import moe, net, system
session = system.init_data_model_parallel(group_count=2, backend="gloo")
if os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0" and session.global_rank == 1:
    sys.exit("the first attempt fails")
total = net.simple_all_reduce(torch.tensor([session.global_rank + 1.0]))
session.dist_print(total.item(), session.global_size, session.local_size, session.model_size)
"""


def test_torchs_launcher_starts_failing_programs_again(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(LAUNCHED)
    command = [sys.executable, "-W", "error", "-m", "torch.distributed.run", "--nproc_per_node=2", "--max_restarts=1"]
    command += ["--monitor_interval=0.1", f"--master_port={free_port()}", str(program)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "TUTEL_GLOBAL_TIMEOUT_SEC": "20"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=env, check=False)
    assert done.returncode == 0, done.stderr
    assert printed(done.stdout) == "3.0 2 2 1\n"
    assert done.stderr.count("the first attempt fails") == 1


def test_slurm_and_open_mpi_and_no_master(tmp_path):
    """Each launcher's variables alone bring two processes together on this host."""
    port = {"MASTER_PORT": str(free_port())}
    launchers = {
        "slurm": lambda r: {"SLURM_PROCID": r, "SLURM_NTASKS": "2", "SLURM_LOCALID": r, "SLURM_NNODES": "1", **port},
        "open mpi": lambda r: {
            "OMPI_COMM_WORLD_RANK": r, "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": r,
            "OMPI_COMM_WORLD_LOCAL_SIZE": "2", **port,
        },
    }  # fmt: skip
    clean = {
        name: value for name, value in os.environ.items() if not name.startswith(("MASTER_", "RANK", "WORLD_SIZE"))
    }
    for variables in launchers.values():
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        command = [sys.executable, "-W", "error", "-c", LAUNCHED]
        both = [subprocess.Popen(command, env=clean | variables(str(rank)), **pipe) for rank in range(2)]
        outputs = [printed(process.communicate(timeout=100)[0]) for process in both]
        assert outputs == ["3.0 2 2 1\n", ""]
        assert [process.returncode for process in both] == [0, 0]
