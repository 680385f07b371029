"""What a layer over W ranks costs in each parallel mode: a model of bytes, messages, seconds and memory.

Nothing here talks to other ranks or measures: the same numbers in give the same numbers out, on every rank.

Symbols: T tokens a rank of width D (D_out behind the experts), E experts with H hidden units, K choices a token,
N = T K rows less those dropped, n ranks that share an expert (E = W / n) or e experts a rank (E = W e), s bytes an
element, r the degree: how many ranks a row is sent to.

**Messages.** One of b bytes takes a + b / B seconds, with a latency a and a bandwidth B (Hockney, *The communication
challenge for MPP*, Parallel Computing 20, 1994). A rank sends one after the other, and receives meanwhile. Links inside
a node of m ranks have their own a and B, and so have those between nodes.

**All-to-all** of b bytes, 1/W of them for each rank: W - 1 messages, m - 1 inside the node and W - m between nodes,
``(m - 1) a_in + (W - m) a_out + (m - 1)/W b / B_in + (W - m)/W b / B_out``.
Hierarchical, that is inside the node first and then between the ranks of one place in their nodes, it takes
(m - 1) + (W/m - 1) messages,
``(m - 1) a_in + (W/m - 1) a_out + (m - 1)/m b / B_in + (W - m)/W b / B_out``.
The same bytes cross between nodes, in messages m times as large; inside, nearly all bytes move once more.

**All-gather and reduce-scatter** of p equal parts of b bytes, as a ring (Thakur, Rabenseifner, Gropp, *Optimization of
collective communication operations in MPICH*, 2005): p - 1 steps, in each of which every rank passes on one part,
``(p - 1) (a + b / B)``. In a ring over nodes, one rank of each node sends to another node, and has for itself what the
node's q ranks in the ring have together: B = min(B_in, q B_out), and a = a_out. Blocks of p neighbours that do not fit
into nodes have q = gcd(p, m). A step waits for the one before, while the messages of an all-to-all do not wait for each
other: where that makes steps longer, a is a latency of its own here.

**Modes** (Hwang et al., *Tutel: Adaptive Mixture-of-Experts at Scale*, MLSys 2023; its P1 and P2 are r = 1 and r = n).
An expert has P = (matrices - 1) H D + H D_out weights, and perhaps H + D_out biases. Forward:

- r = 0, data parallel: tokens stay. Each parameter is gathered from all W ranks.
- r >= 1: each row goes to the r ranks of one of an expert's n / r subgroups, and r partial sums of it come back: two
  all-to-alls, of r N D s and r N D_out s bytes. Before, ranks tell each other how many rows come: W d e numbers of 8
  bytes. Each of the r ranks computes H / r hidden units, and gathers n / r of the expert's n shards from its neighbours
  for that, parameter by parameter; biases of outputs come from all n.

In training the outputs' gradients go where rows went, and the rows' gradients come back: the same bytes once more.
Gathered weights are kept until then; their gradients are reduced and scattered: the same bytes once more. Where ranks
compare what they bring (on the CPU), each of these collectives comes after a ring of 128 bytes.

**Computing**: 2 N P floating-point operations a rank in every mode, since r ranks share the work on r times the rows,
and twice that in the backward pass. Rows are taken to be evenly divided among experts.

**Overlap** in d chunks, whose rows are sent, computed and sent back. The link carries one message at a time, the
processor computes one chunk at a time. Nothing is computed before the first chunk has come, the last one goes back when
all is computed, and the link is busy for all chunks. So with x and y seconds for a chunk to come and to go, and C for
computing all, no schedule is shorter than ``max(x + C + y, d (x + y))``; one within C / d of that exists, and for d = 1
it is x + C + y. Each chunk costs its own messages. An exchange is taken to need no processor: over Gloo, with as many
busy processes as cores, there is little to gain.

Left out: routing, dispatch and combine (the same in every mode), conversions, and what else is sent meanwhile.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from tutel.errors import check_bool, check_int, check_number, one_of

#: The backward pass of a product is two products.
_BACKWARD = 2
#: Bytes of a number of rows, and of what ranks compare before a collective.
_NUMBER = 8
_COMPARED = 128


@dataclass(frozen=True)
class Sizes:
    """The layer and its input, as all ranks have agreed on them.

    Attributes:
        tokens: T, of the rank that has most.
        model_dim: D.
        hidden: H of a whole expert.
        output_dim: D_out.
        num_experts: E; it divides W, or W divides it.
        top_k: K, at most E.
        world_size: W.
        element_size: s, bytes of an element.
        capacity_factor: The gate's: of |f| > 0, an expert takes at most K int(|f| ceil(T / E)) choices of a rank.
        matrices: Matrices of an expert: 2, or 3 where hidden units are gated.
        biases: Whether both layers of an expert have biases.
        wire_size: s of rows while they travel, where they are narrowed.

    Raises:
        TypeError: If one has the wrong type.
        ValueError: If one is out of range.
    """

    tokens: int
    model_dim: int
    hidden: int
    output_dim: int
    num_experts: int
    top_k: int
    world_size: int
    element_size: int
    capacity_factor: float = 0.0
    matrices: int = 2
    biases: bool = True
    wire_size: float | None = None

    def __post_init__(self) -> None:
        check_int("tokens", self.tokens, at_least=0)
        for name in ("model_dim", "hidden", "output_dim", "num_experts", "top_k", "world_size", "element_size"):
            check_int(name, getattr(self, name), at_least=1)
        check_int("matrices", self.matrices, at_least=2)
        check_number("capacity_factor", self.capacity_factor)
        check_bool("biases", self.biases)
        if self.wire_size is not None and check_number("wire_size", self.wire_size) <= 0:
            raise ValueError(f"wire_size must be above 0, got {self.wire_size}")
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k must be at most num_experts ({self.num_experts}), got {self.top_k}")
        if self.num_experts % self.world_size and self.world_size % self.num_experts:
            raise ValueError(
                f"num_experts must divide world_size ({self.world_size}) or be a multiple of it, got {self.num_experts}"
            )

    @property
    def shards(self) -> int:
        """n, ranks that share an expert."""
        return max(1, self.world_size // self.num_experts)

    @property
    def local_experts(self) -> int:
        """e, experts of a rank; 1 where it has a shard of one."""
        return max(1, self.num_experts // self.world_size)

    @property
    def rows(self) -> int:
        """N, rows of a rank's tokens that experts compute."""
        choices = self.tokens * self.top_k
        if self.capacity_factor == 0:
            return choices
        capacity = self.top_k * int(abs(self.capacity_factor) * -(-self.tokens // self.num_experts))
        return min(choices, self.num_experts * capacity)

    @property
    def expert_weights(self) -> int:
        """P, elements of one expert's matrices."""
        return self.hidden * ((self.matrices - 1) * self.model_dim + self.output_dim)

    @property
    def hidden_parameters(self) -> list[int]:
        """Elements of each of one expert's parameters that belong to hidden units."""
        first = [self.hidden * self.model_dim] * (self.matrices - 1)
        return [*first, self.hidden * self.output_dim, *([self.hidden] if self.biases else [])]

    @property
    def output_parameters(self) -> list[int]:
        """Likewise of those that do not."""
        return [self.output_dim] if self.biases else []


@dataclass(frozen=True)
class Links:
    """How fast ranks talk and compute.

    Attributes:
        intra: Bytes a second that a rank sends to others of its node.
        inter: The same to other nodes, while all ranks of its node do so.
        latency_intra: Seconds that a message inside a node takes, however short.
        latency_inter: The same between nodes.
        node_size: m, ranks of a node; where it does not divide the number of ranks, each rank counts as a node.
        rate: Floating-point operations a second of the experts' products.
        step_intra: Seconds that a step of a ring inside a node takes at least; None: as long as a message.
        step_inter: The same over several nodes.
        compares: Whether ranks compare what they bring before they gather weights, as they do on the CPU.

    Raises:
        TypeError: If one has the wrong type.
        ValueError: If one is out of range.
    """

    intra: float
    inter: float
    latency_intra: float
    latency_inter: float
    node_size: int
    rate: float
    step_intra: float | None = None
    step_inter: float | None = None
    compares: bool = False

    def __post_init__(self) -> None:
        check_bool("compares", self.compares)
        check_int("node_size", self.node_size, at_least=1)
        for name in ("latency_intra", "latency_inter", "step_intra", "step_inter"):
            if getattr(self, name) is not None or name.startswith("latency"):
                check_number(name, getattr(self, name), at_least=0)
        for name in ("intra", "inter", "rate"):
            if check_number(name, getattr(self, name)) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)!r}")


@dataclass(frozen=True)
class Cost:
    """What one step costs one rank: a forward, and in training its backward.

    Attributes:
        degree: r.
        bytes_tokens: Bytes of rows, and of their counts, that it sends to other ranks.
        bytes_weights: The same of weights and their gradients.
        messages: How many messages it sends.
        seconds_exchange: How long its links are busy.
        seconds_compute: How long the experts' products take.
        seconds_total: From the first message to the last; less than the sum of both where they overlap.
        memory: Bytes of parameters, weights gathered, rows and hidden units that are alive at once at most; in training
            with all gradients, without an optimizer's state.
    """

    degree: int
    bytes_tokens: float
    bytes_weights: float
    messages: int
    seconds_exchange: float
    seconds_compute: float
    seconds_total: float
    memory: float


@dataclass(frozen=True)
class _Sent:
    """What a collective sends from each rank."""

    sent: float = 0.0
    messages: int = 0
    seconds: float = 0.0

    @classmethod
    def sum(cls, parts: "list[_Sent]") -> "_Sent":
        """Do one after the other."""
        return cls(*map(sum, zip(*((part.sent, part.messages, part.seconds) for part in parts), strict=True)))


def valid_degrees(shards: int) -> list[int]:
    """Return the degrees that n ranks can share an expert in: 0, and the divisors of n."""
    n = check_int("shards", shards, at_least=1)
    return [0, *(r for r in range(1, n + 1) if n % r == 0)]


def cost(
    sizes: Sizes, links: Links, degree: int, *, training: bool, overlap_degree: int = 1, hierarchical: bool = False
) -> Cost:
    """Return what a step costs in one mode; the module's text derives it.

    Args:
        sizes: The layer and its input.
        links: The machine.
        degree: r.
        training: With the backward pass.
        overlap_degree: d, chunks of rows whose exchange and computation overlap.
        hierarchical: Exchange rows inside nodes first, then across.

    Raises:
        TypeError: If r or d is no integer.
        ValueError: If r is neither 0 nor a divisor of n, or d is below 1.
    """
    r = check_int("degree", degree, at_least=0)
    chunks = check_int("overlap_degree", overlap_degree, at_least=1)
    allowed = valid_degrees(sizes.shards)
    if r not in allowed:
        raise ValueError(f"degree must be {one_of(allowed)}, got {r}")
    m = _node_size(sizes.world_size, links)
    weights = _Sent.sum(_weights(sizes, links, r))
    compute = 2 * sizes.rows * sizes.expert_weights / links.rate
    counts, come, go = _Sent(), _Sent(), _Sent()
    if r > 0:
        row_bytes = r * sizes.rows * (sizes.element_size if sizes.wire_size is None else sizes.wire_size) / chunks
        told = sizes.world_size * chunks * sizes.local_experts * _NUMBER
        counts = _all_to_all(told, sizes.world_size, links, hierarchical)
        come = _all_to_all(row_bytes * sizes.model_dim, sizes.world_size, links, hierarchical)
        go = _all_to_all(row_bytes * sizes.output_dim, sizes.world_size, links, hierarchical)
    else:
        chunks = 1
    passes = [compute, _BACKWARD * compute] if training else [compute]
    exchanged = chunks * (come.seconds + go.seconds)
    overlapped = sum(max(come.seconds + seconds + go.seconds, exchanged) for seconds in passes)
    return Cost(
        degree=r,
        bytes_tokens=counts.sent + len(passes) * chunks * (come.sent + go.sent),
        bytes_weights=len(passes) * weights.sent,
        messages=counts.messages + len(passes) * (chunks * (come.messages + go.messages) + weights.messages),
        seconds_exchange=counts.seconds + len(passes) * (exchanged + weights.seconds),
        seconds_compute=sum(passes),
        seconds_total=counts.seconds + len(passes) * weights.seconds + overlapped,
        memory=_memory(sizes, r, training=training, staged=hierarchical and 1 < m < sizes.world_size),
    )


def choose_degree(
    sizes: Sizes,
    links: Links,
    valid_rs: Iterable[int],
    training: bool,
    *,
    overlap_degree: int = 1,
    hierarchical: bool = False,
) -> int:
    """Return the degree that takes the fewest seconds; of several, the smallest.

    All ranks choose the same if they pass the same, which is the caller's to see to: the largest T of the ranks, and
    links that all have agreed on.

    Raises:
        ValueError: If there is no degree to choose from, or one is not valid.
    """
    degrees = sorted(valid_rs)
    if not degrees:
        raise ValueError("valid_rs must hold at least one degree, got none")

    def seconds(r: int) -> float:
        of_mode = cost(sizes, links, r, training=training, overlap_degree=overlap_degree, hierarchical=hierarchical)
        return of_mode.seconds_total

    return min(degrees, key=seconds)


def _node_size(ranks: int, links: Links) -> int:
    if ranks <= links.node_size:
        return ranks
    return links.node_size if ranks % links.node_size == 0 else 1


def _all_to_all(size: float, ranks: int, links: Links, hierarchical: bool) -> _Sent:
    """Exchange ``size`` bytes a rank, equally many for each; hierarchical where there are nodes of several ranks."""
    m = _node_size(ranks, links)
    nodes = ranks // m
    staged = hierarchical and 1 < m < ranks
    inside = size * (m - 1) / (m if staged else ranks)
    across = size * (ranks - m) / ranks
    messages_across = nodes - 1 if staged else ranks - m
    return _Sent(
        sent=inside + across,
        messages=m - 1 + messages_across,
        seconds=(m - 1) * links.latency_intra
        + messages_across * links.latency_inter
        + inside / links.intra
        + across / links.inter,
    )


def _ring(parts: list[float], members: int, m: int, links: Links) -> _Sent:
    """Gather parts of so many bytes each from neighbouring members, or reduce and scatter them."""
    if links.compares:
        parts = [*parts, *[_COMPARED] * len(parts)]
    within = m % members == 0
    bandwidth = links.intra if within else min(links.intra, math.gcd(members, m) * links.inter)
    step = links.step_intra if within else links.step_inter
    latency = step if step is not None else links.latency_intra if within else links.latency_inter
    steps = members - 1
    sent = steps * sum(parts)
    return _Sent(sent, steps * len(parts), steps * len(parts) * latency + sent / bandwidth)


def _weights(sizes: Sizes, links: Links, r: int) -> list[_Sent]:
    """Gather what a rank needs of parameters that others hold."""
    share = sizes.element_size * sizes.num_experts / sizes.world_size
    m = _node_size(sizes.world_size, links)
    hidden = [share * elements for elements in sizes.hidden_parameters]
    outputs = [share * elements for elements in sizes.output_parameters]
    if r == 0:
        return [_ring([*hidden, *outputs], sizes.world_size, m, links)]
    return [_ring(hidden, sizes.shards // r, m, links), _ring(outputs, sizes.shards, m, links)]


def _memory(sizes: Sizes, r: int, *, training: bool, staged: bool) -> float:
    """Return the bytes alive at once: parameters, gathered weights (and gradients of both), rows, hidden units.

    Rows: tokens and outputs; rows to send and rows received; partial sums computed and received; rows on their way
    through the node, once more.
    """
    expert = sum([*sizes.hidden_parameters, *sizes.output_parameters])
    own = expert * sizes.num_experts / sizes.world_size
    gathered = 0.0
    if r == 0 and sizes.world_size > 1:
        gathered = float(expert * sizes.num_experts)
    elif r > 0 and sizes.shards > r:
        gathered = expert / r
    wide = sizes.model_dim + sizes.output_dim
    exchanged = 2 * r * sizes.rows * wide if sizes.world_size > 1 and r > 0 else sizes.rows * wide
    through = r * sizes.rows * max(sizes.model_dim, sizes.output_dim) if staged else 0
    hidden = (sizes.matrices - 1) * sizes.rows * sizes.hidden
    kept = (own + gathered) * (2 if training else 1)
    return sizes.element_size * (kept + sizes.tokens * wide + exchanged + through + hidden)
