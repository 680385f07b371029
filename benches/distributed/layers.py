"""The layer over several ranks: what it sends, what overlap gains, what switches of modes cost, what the model says."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed
from tutel.distributed.cost import Links, Sizes, choose_degree, cost
from tutel.distributed.exchange import Swap, finish, start
from tutel.distributed.trip import direct_trips
from tutel.distributed.wire import Wire

from benches.distributed.sampling import Effort, alternate, ratio
from benches.distributed.traffic import watch
from benches.harness import Spread
from tutel import moe, net

OVERLAP_DEGREES = (1, 2, 4)


@dataclass(frozen=True)
class Shape:
    """A layer: T tokens a rank, D, H, and e experts a rank or -n for an expert on n ranks; float32."""

    tokens: int
    model_dim: int
    hidden: int
    experts: int
    top_k: int

    def __str__(self) -> str:
        held = f"e = {self.experts}" if self.experts > 0 else f"n = {-self.experts}"
        return f"T = {self.tokens}, D = {self.model_dim}, H = {self.hidden}, {held}, K = {self.top_k}"

    def sizes(self, ranks: int) -> Sizes:
        """Return what the cost model takes."""
        total = self.experts * ranks if self.experts > 0 else ranks // -self.experts
        return Sizes(self.tokens, self.model_dim, self.hidden, self.model_dim, total, self.top_k, ranks, element_size=4)

    def layer(self, group: Any = None, experts: int | None = None, **options: Any) -> moe.moe_layer:
        """Make the layer; gates are the same on all ranks."""
        kind = {"type": "ffn", "hidden_size_per_expert": self.hidden, "activation_fn": torch.nn.functional.relu}
        return moe.moe_layer(
            {"type": "top", "k": self.top_k, "capacity_factor": 0.0},
            self.model_dim,
            {**kind, "count_per_node": self.experts if experts is None else experts},
            group=group,
            seeds=(1, 2, 3),
            **options,
        )

    def tokens_of_rank(self) -> Tensor:
        """Draw this rank's tokens."""
        torch.manual_seed(net.get_world_rank())
        return torch.randn(self.tokens, self.model_dim, requires_grad=True)


EXCHANGE = Shape(tokens=512, model_dim=512, hidden=1024, experts=2, top_k=2)


def step(layer: moe.moe_layer, tokens: Tensor, **options: Any) -> Callable[[], None]:
    """Return a forward and backward."""

    def run() -> None:
        layer.zero_grad()
        tokens.grad = None
        layer(tokens, **options).sum().backward()

    return run


@dataclass(frozen=True)
class Sent:
    """Bytes of one training step that all ranks together send.

    Attributes:
        name: The layer.
        rows: Of rows.
        minimum: Of exactly the rows whose expert is on another rank, there and back, forward and backward.
        numbers: Of counts and settings.
    """

    name: str
    rows: int
    minimum: int
    numbers: int


def sent_bytes() -> list[Sent]:
    """Count what each kind of exchange sends; tokens choose some experts more often than others."""
    shape = EXCHANGE
    tokens = shape.tokens_of_rank()
    found = []
    for name, options in [("ragged", {}), ("fixed, f = 0", {"exchange": "fixed"}), ("ragged, bfloat16 on the wire",
                          {"wire_dtype": "bfloat16"})]:  # fmt: skip
        layer = shape.layer(**options)
        with torch.no_grad():
            layer.gates[0].wg.weight[0] *= 3
        chosen = (tokens @ layer.gates[0].wg.weight.T).topk(shape.top_k, dim=1).indices
        remote = int((chosen // shape.experts != net.get_world_rank()).sum())
        with watch() as traffic:
            step(layer, tokens)()
        together = torch.tensor([traffic.rows, 4 * remote * shape.model_dim * 4, traffic.numbers])
        distributed.all_reduce(together)
        found.append(Sent(name, *together.tolist()))
    return found


@dataclass(frozen=True)
class Compared:
    """Times of several sides, and each one's ratio to the first, round by round."""

    name: str
    seconds: dict[str, Spread]
    ratios: dict[str, Spread]
    #: Bytes that a rank sends in one go, where that is told.
    sent: int = 0


def _compare(name: str, sides: dict[str, Callable[[], object]], effort: Effort, sent: int = 0) -> Compared:
    taken = alternate(sides, effort)
    first = next(iter(taken.values()))
    return Compared(
        name,
        {side: Spread.of(seconds) for side, seconds in taken.items()},
        {side: ratio(seconds, first) for side, seconds in taken.items()},
        sent,
    )


def against_bare(effort: Effort) -> list[Compared]:
    """Time our exchange of rows, with and without the counts before it, beside Gloo's all-to-all of the same rows."""
    ranks, width = net.get_world_size(), EXCHANGE.model_dim
    found = []
    for rows in (64, 1024, 8192):
        # Uneven, as routing makes it, and the same for all pairs of ranks both ways.
        sends = [rows // ranks + (rank - ranks // 2) * (rows // (4 * ranks)) for rank in range(ranks)]
        mine = sends[net.get_world_rank()]
        swap = Swap(sends, [mine] * ranks, None, Wire())
        given, taken = torch.randn(sum(sends), width), torch.empty(mine * ranks, width)
        counts = torch.tensor(sends).view(1, ranks, 1)

        def bare(taken: Tensor = taken, given: Tensor = given, swap: Swap = swap) -> None:
            distributed.all_to_all_single(taken, given, swap.receives, swap.sends)

        def ours(given: Tensor = given, swap: Swap = swap) -> None:
            finish(*start(given, swap, "rows"))

        def counted(given: Tensor = given, counts: Tensor = counts) -> None:
            [trip] = direct_trips(counts, None, Wire())
            trip.start(given, "rows").finish()

        sent = (sum(sends) - mine) * width * 4
        sides = {"all_to_all_single": bare, "our exchange": ours, "with counts": counted}
        found.append(_compare(f"{rows} rows of {width} float32", sides, effort, sent))
    return found


def overlap(effort: Effort) -> Compared:
    """Time a training step in one, two and four chunks."""
    layer, tokens = EXCHANGE.layer(), EXCHANGE.tokens_of_rank()
    sides = {f"d = {d}": step(layer, tokens, a2a_ffn_overlap_degree=d) for d in OVERLAP_DEGREES}
    return _compare(str(EXCHANGE), sides, effort)


def switching(shape: Shape, effort: Effort) -> Compared:
    """Time two steps in one mode and then two in another, and the same by turns."""
    layer, tokens = shape.layer(), shape.tokens_of_rank()
    low, high = layer.valid_rs[1], layer.valid_rs[-1]

    def steps(*degrees: int) -> Callable[[], None]:
        runs = [step(layer, tokens, adaptive_r=r) for r in degrees]
        return lambda: [run() for run in runs] and None

    sides = {
        "one after the other": steps(low, low, high, high),
        "by turns": steps(low, high, low, high),
    }
    return _compare(f"{shape}, r = {low} and {high}", sides, effort)


@dataclass(frozen=True)
class Mode:
    """A mode, measured and modelled: a whole step, and the seconds that the model has for it."""

    degree: int
    step: Spread
    exchange: float
    modelled: float
    modelled_exchange: float


@dataclass(frozen=True)
class Modes:
    """All modes of a layer.

    Attributes:
        name: The layer.
        alone: Seconds of a step of as many rows where nothing is exchanged, on all ranks at once.
        chosen: The degree that the model chooses.
    """

    name: str
    modes: list[Mode]
    alone: Spread
    chosen: int

    @property
    def loss(self) -> float:
        """The chosen mode's least time over that of the fastest."""
        times = {mode.degree: mode.step.median for mode in self.modes}
        return times[self.chosen] / min(times.values())


def modes(shape: Shape, links: Links, effort: Effort) -> Modes:
    """Time a step in every mode, beside the model."""
    ranks = net.get_world_size()
    layer, tokens = shape.layer(), shape.tokens_of_rank()
    total = layer.num_global_experts
    alone = shape.layer(group=net.create_standalone_group(), experts=total)
    degrees = list(layer.valid_rs)
    sides = {f"r = {r}": step(layer, tokens, adaptive_r=r) for r in degrees}
    taken = alternate({"alone": step(alone, tokens), **sides}, effort)
    by_itself = Spread.of(taken["alone"])
    found = []
    for r in degrees:
        seconds = Spread.of(taken[f"r = {r}"])
        model = cost(shape.sizes(ranks), links, r, training=True)
        exchange = Spread.of([a - b for a, b in zip(taken[f"r = {r}"], taken["alone"], strict=True)]).median
        found.append(Mode(r, seconds, exchange, model.seconds_total, model.seconds_exchange))
    return Modes(str(shape), found, by_itself, choose_degree(shape.sizes(ranks), links, degrees, True))
