"""Binding a process to the CPUs of one NUMA node."""

import os
import re
import warnings
from pathlib import Path

#: Where Linux lists its NUMA nodes.
NODES = Path("/sys/devices/system/node")


def bind(local_rank: int, ranks_per_node: int, nodes: Path = NODES) -> set[int] | None:
    """Bind this process to the NUMA node of its local rank, within the CPUs that it may use already.

    Containers and schedulers confine a process to some CPUs: nodes without any of them are not counted, and no CPU is
    added. A failure is a warning, since the program computes the same without.

    Args:
        local_rank: Number of this process on its host.
        ranks_per_node: How many neighbouring local ranks go to a node, before the next ones go to the next; below 1
            nothing is bound.
        nodes: Folder of the nodes.

    Returns:
        The CPUs, or None if nothing was bound.
    """
    if ranks_per_node < 1:
        return None
    try:
        cpus = choose_cpus(local_rank // ranks_per_node, os.sched_getaffinity(0), nodes)
        os.sched_setaffinity(0, cpus)
    # AttributeError: this system has no such call.
    except (OSError, ValueError, AttributeError) as error:
        warnings.warn(f"the process is not bound to a NUMA node: {error}", RuntimeWarning, stacklevel=3)
        return None
    return cpus


def choose_cpus(turn: int, allowed: set[int], nodes: Path = NODES) -> set[int]:
    """Return the CPUs of the node whose turn it is, counting round those that have allowed CPUs.

    Raises:
        OSError: If the nodes cannot be read.
        ValueError: If their text is not understood, or no node has an allowed CPU.
    """
    names = (folder.name for folder in nodes.iterdir())
    numbers = sorted(int(name[4:]) for name in names if re.fullmatch(r"node\d+", name))
    usable = [cpus for n in numbers if (cpus := allowed & parse_cpus((nodes / f"node{n}" / "cpulist").read_text()))]
    if not usable:
        raise ValueError(f"no node in {nodes} has one of the CPUs {sorted(allowed)}")
    return usable[turn % len(usable)]


def parse_cpus(text: str) -> set[int]:
    """Read a list such as ``0-3,8,10-11``.

    Raises:
        ValueError: If it is no such list.
    """
    cpus: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        cpus.update(range(int(first), int(last or first) + 1))
    return cpus
