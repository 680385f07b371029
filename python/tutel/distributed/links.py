"""How fast the ranks of a group talk, measured once; what ``parallel_type='auto'`` gives to the cost model."""

import time
import weakref
from collections.abc import Callable

import torch
from torch import distributed

from tutel import env
from tutel.distributed.cost import Links
from tutel.distributed.failure import stage
from tutel.distributed.groups import Group, divide, group_device, node_size, world_size

#: Bytes of a large exchange, of all messages of a rank together.
_LARGE = 8 << 20
#: Shorter messages than this cost latency only.
_SMALL = 4
_ROUNDS = 5
_PRODUCT = 512
#: Where there is nobody to talk to: no cost depends on it.
_ANY = {"intra": 1e9, "inter": 1e9, "latency_intra": 0.0, "latency_inter": 0.0, "step_intra": 0.0, "step_inter": 0.0}

_measured: "weakref.WeakKeyDictionary[object, Links]" = weakref.WeakKeyDictionary()


def measured_links(group: Group = None) -> Links:
    """Return the bandwidth, the latency and the matrix rate that a group's ranks have together.

    The first call measures for some 0.1 s, and all ranks of the group must make it; later ones return the same object.
    What ``TUTEL_LINKS`` says is taken instead of what was measured. Of what the ranks found, the slowest counts, so all
    have the same numbers.

    Raises:
        ValueError: If ``TUTEL_LINKS`` is not understood.
        RankError: If a rank does not come.
    """
    if world_size(group) == 1:
        return _links({**_ANY, "rate": 1e9, **_spread(env.links())}, 1)
    key = distributed.group.WORLD if group is None else group
    if key not in _measured:
        _measured[key] = _measure(group)
    return _measured[key]


def _spread(known: dict[str, float]) -> dict[str, float]:
    """Give one latency of the environment to all kinds of messages."""
    found = {name: value for name, value in known.items() if name != "latency"}
    if "latency" in known:
        found |= dict.fromkeys(("latency_intra", "latency_inter", "step_intra", "step_inter"), known["latency"])
    return found


def _measure(group: Group) -> Links:
    m = node_size(group)
    known = _spread(env.links())
    # Ranks that were told everything must still measure if others were not: exchanges take all of them.
    told = _slowest({"everything": float({*_ANY, "rate"} <= set(known))}, group)["everything"]
    found = {} if told else {**_link_speeds(group, m), "rate": _product_rate(group_device(group))}
    checked = env.check_ranks()
    compares = group_device(group).type == "cpu" if checked is None else checked
    return _links(_slowest({**found, **known, "compares": float(compares)}, group), m)


def _link_speeds(group: Group, m: int) -> dict[str, float]:
    inside, across = divide(m, group)
    found = {}
    if m > 1:
        found["latency_intra"], found["intra"] = _exchange_speed(inside)
        found["step_intra"] = _step_seconds(inside)
    if m < world_size(group):
        # All ranks of a node send at once, as they do when rows are exchanged.
        found["latency_inter"], found["inter"] = _exchange_speed(across)
        found["step_inter"] = _step_seconds(group)
    # Where there is one kind of links, no cost depends on the other.
    for kind, other in (("intra", "inter"), ("inter", "intra")):
        if kind not in found:
            found |= {f"{name}{kind}": found[f"{name}{other}"] for name in ("", "latency_", "step_")}
    return found


def _links(found: dict[str, float], m: int) -> Links:
    return Links(
        intra=found["intra"],
        inter=found["inter"],
        latency_intra=found["latency_intra"],
        latency_inter=found["latency_inter"],
        node_size=m,
        rate=found["rate"],
        step_intra=found["step_intra"],
        step_inter=found["step_inter"],
        compares=bool(found.get("compares")),
    )


def _slowest(found: dict[str, float], group: Group) -> dict[str, float]:
    """Agree on the longest latencies and steps, and the least of all speeds, over the ranks."""
    names = sorted(found)
    # The largest of minus the speeds: one reduction, and no speed is rounded by being inverted.
    signs = [1 if name.startswith(("latency", "step")) else -1 for name in names]
    values = torch.tensor(
        [sign * found[name] for sign, name in zip(signs, names, strict=True)],
        dtype=torch.float64,
        device=group_device(group),
    )
    with stage("agreeing on the speed of links", group):
        distributed.all_reduce(values, distributed.ReduceOp.MAX, group=group)
    return {name: sign * value for sign, name, value in zip(signs, names, values.tolist(), strict=True)}


def _exchange_speed(group: Group) -> tuple[float, float]:
    """Return (seconds a message, bytes a second that a rank sends) of an all-to-all."""
    ranks, device = world_size(group), group_device(group)
    seconds = []
    for size in (_SMALL, max(_LARGE // ranks, 1 << 14)):
        sent = torch.zeros(ranks * size, dtype=torch.uint8, device=device)
        received = torch.empty_like(sent)

        def exchange(sent: torch.Tensor = sent, received: torch.Tensor = received) -> None:
            distributed.all_to_all_single(received, sent, group=group)

        with stage("measuring the speed of links", group):
            seconds.append(_best(exchange, device))
    messages = ranks - 1
    longer = max(seconds[1] - seconds[0], 1e-9)
    return seconds[0] / messages, messages * size / longer


def _step_seconds(group: Group) -> float:
    """Return the seconds of a step of a ring; a gather has one step less than there are ranks."""
    ranks, device = world_size(group), group_device(group)
    part = torch.zeros(_SMALL, dtype=torch.uint8, device=device)
    parts = torch.empty(ranks * _SMALL, dtype=torch.uint8, device=device)
    with stage("measuring the speed of links", group):
        seconds = _best(lambda: distributed.all_gather_into_tensor(parts, part, group=group), device)
    return seconds / (ranks - 1)


def _product_rate(device: torch.device) -> float:
    """Return the floating-point operations a second of a matrix product in float32."""
    left = torch.ones(_PRODUCT, _PRODUCT, device=device)
    return 2 * _PRODUCT**3 / _best(lambda: left @ left, device)


def _best(run: Callable[[], object], device: torch.device) -> float:
    """Return the least seconds of some calls, the first of which connects and is not counted."""
    best = float("inf")
    for counted in range(_ROUNDS + 1):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if counted:
            best = min(best, time.perf_counter() - start)
    return best
