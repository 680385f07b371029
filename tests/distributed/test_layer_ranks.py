"""A layer over 1 to 4 ranks gives what one rank gives: outputs, losses and gradients, whatever way rows take."""

import copy
import itertools
import os
from typing import Any

import pytest
import torch
from layer_twin import HIDDEN, MODEL_DIM, Case, check, make_pair
from ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from tutel.distributed.failure import RankError
from tutel.layer import MOELayer

from tutel import moe, net

EVEN, UNEVEN, ONE_EMPTY = (7, 7, 7, 7), (7, 2, 5, 9), (0, 5, 1, 2)
EXCHANGES: list[dict[str, Any]] = [
    {},
    {"a2a_ffn_overlap_degree": 2},
    {"a2a_ffn_overlap_degree": 5},
    {"exchange": "fixed"},
    {"exchange": "fixed", "a2a_ffn_overlap_degree": 3},
    {"exchange": "gather"},
]


def check_all(cases: list[Case]) -> None:
    for case in cases:
        check(case)


def whole_experts() -> list[Case]:
    """Each rank has whole experts: every way of rows x choices x drops x numbers of tokens."""
    cases = []
    for layer, (tokens, skewed), (top_k, factor) in itertools.product(
        EXCHANGES,
        [(EVEN, False), (UNEVEN, False), (ONE_EMPTY, False), (UNEVEN, True)],
        [(1, 0.0), (2, 0.0), (2, -0.5)],
    ):
        # Fixed numbers need one capacity; where ranks differ in tokens, it is that of the largest.
        if layer.get("exchange") == "fixed" and factor and tokens != EVEN:
            continue
        cases.append(Case(layer=layer, tokens=tokens, skewed=skewed, gate={"k": top_k, "capacity_factor": factor}))
    for layer in EXCHANGES:
        cases.append(Case(layer={**layer, "is_postscore": False}, tokens=UNEVEN))
        cases.append(Case(1, layer=layer, experts={"type": "llama_ffn"}, tokens=UNEVEN))
        cases.append(Case(layer=layer, experts={"output_dim": 3, "has_fc2_bias": False}))
    cases.append(Case(forward={"adaptive_r": 0}, tokens=UNEVEN))
    cases.append(Case(forward={"top_k": 1, "capacity_factor": 0.7}))
    return cases


def shared_experts(ranks: int, shards: int) -> list[Case]:
    """``shards`` ranks share an expert: every degree x every way of rows."""
    cases = []
    degrees = [0, *(degree for degree in range(1, shards + 1) if shards % degree == 0)]
    for degree, layer in itertools.product(degrees, EXCHANGES):
        gate = {"k": 1 if shards == ranks else 2, "capacity_factor": 0.0}
        common: dict[str, Any] = {"layer": layer, "forward": {"adaptive_r": degree}, "gate": gate, "tokens": UNEVEN}
        cases.append(Case(-shards, **common))
        cases.append(Case(-shards, **common, experts={"type": "llama_ffn"}))
        cases.append(Case(-shards, **common, experts={"output_dim": 5, "fc1_copies": 2, "activation_fn": gated}))
    return cases


def gated(hidden: Tensor) -> Tensor:
    left, right = hidden.chunk(2, -1)
    return nn.functional.silu(left) * right


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_whole_experts(ranks: int) -> None:
    run_ranks(check_all, ranks, whole_experts(), timeout=100)


@pytest.mark.parametrize(("ranks", "shards"), [(2, 2), (3, 3), (4, 2), (4, 4)])
def test_shared_experts(ranks: int, shards: int) -> None:
    run_ranks(check_all, ranks, shared_experts(ranks, shards), timeout=100)


def nodes_of_two(cases: list[Case]) -> None:
    rank = int(os.environ["RANK"])
    os.environ.update(LOCAL_RANK=str(rank % 2), LOCAL_WORLD_SIZE="2")
    check_all(cases)


def test_exchange_inside_nodes_first() -> None:
    layers: list[dict[str, Any]] = [{"use_2dh": True}, {"use_2dh": True, "a2a_ffn_overlap_degree": 3}]
    cases = [Case(layer=layer, tokens=tokens) for layer in layers for tokens in (EVEN, UNEVEN, ONE_EMPTY)]
    cases += [Case(-2, layer=layer, tokens=UNEVEN, forward={"adaptive_r": 2}) for layer in layers]
    run_ranks(nodes_of_two, 4, cases)


def test_other_dtypes_and_what_travels() -> None:
    """Rows that travel narrow give outputs within the stated error; the same dtype the same up to rounding."""
    wires: list[dict[str, Any]] = [{}, {"exchange": "gather"}, {"a2a_ffn_overlap_degree": 2}]
    cases = [
        Case(layer=layer, dtype=dtype, tolerance=tolerance)
        for layer in wires
        for dtype, tolerance in ((torch.float32, 2e-6), (torch.bfloat16, 3e-2), (torch.float16, 4e-3))
    ]
    for layer in ({}, {"exchange": "fixed"}, {"a2a_ffn_overlap_degree": 2}):
        for name, tolerance in (("bfloat16", 2.0**-6), ("float8_e4m3", 2.0**-3)):
            cases.append(Case(layer={**layer, "wire_dtype": name}, dtype=torch.float32, tolerance=tolerance))
    run_ranks(check_all, 2, cases)


class RowSum(nn.Module):
    """Experts of a user's own class, which see [e, rows, D]."""

    def __init__(self, model_dim: int, num_experts_per_device: int, sharded_count: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(num_experts_per_device, 1, model_dim))

    def forward(self, rows: Tensor, context: Any) -> Tensor:
        assert rows.shape[0] in (context.num_local_experts, context.num_global_experts)
        return (rows * self.scale).tanh()


def test_users_experts() -> None:
    own = {"type": "custom", "module": RowSum}
    cases = [Case(layer=layer, experts=own, tokens=tokens) for layer in EXCHANGES for tokens in (EVEN, ONE_EMPTY)]
    run_ranks(check_all, 2, cases)


def subgroup(cases: list[Case]) -> None:
    by_mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "experts"))["experts"].get_group()
    for case in cases:
        check(case, net.create_groups_from_world(group_count=-2).model_group)
        check(case, by_mesh)
    net.barrier()  # rank 0 holds the store in which the other half still meets


def test_a_part_of_the_ranks() -> None:
    cases = [Case(layer=layer) for layer in EXCHANGES] + [
        Case(-2, gate={"k": 1}),
        Case(-2, gate={"k": 1}, forward={"adaptive_r": 0}),
    ]
    run_ranks(subgroup, 4, cases)


def switch_modes(steps: int) -> tuple[list[float], list[float]]:
    """Train with a mode that changes at every step, and with one that does not; return both loss curves."""
    curves = []
    for modes in ([1], [0, 1, 2, 4]):
        layer, _ = make_pair(Case(-4, gate={"k": 1, "capacity_factor": 0.0}))
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.5, momentum=0.9)
        torch.manual_seed(5 + net.get_world_rank())
        tokens = torch.randn(9, MODEL_DIM, dtype=torch.float64)
        losses = []
        for step in range(steps):
            optimizer.zero_grad()
            loss = (layer(tokens, adaptive_r=modes[step % len(modes)]) - tokens).square().mean()
            loss.backward()
            for parameter in layer.gates.parameters():
                net.simple_all_reduce(parameter.grad, inplace=True)
            optimizer.step()
            losses.append(float(net.simple_all_reduce(loss.detach())))
        curves.append(losses)
    return curves[0], curves[1]


def test_switching_modes_keeps_the_loss_curve() -> None:
    for steady, switching in run_ranks(switch_modes, 4, 8):
        assert steady[-1] < 0.9 * steady[0]
        assert switching == pytest.approx(steady, rel=1e-12)


def differ(options: list[dict[str, Any]], calls: list[dict[str, Any]], dtypes: list[torch.dtype], shards: int) -> str:
    rank = net.get_world_rank()
    layer, _ = make_pair(Case(-shards or 2, layer=options[rank], dtype=dtypes[rank], gate={"k": 1}))
    try:
        layer(torch.randn(3, MODEL_DIM, dtype=dtypes[rank]), **calls[rank])
    except RankError as error:
        return str(error)
    return "no error"


FLOAT64, SAME = torch.float64, {}


@pytest.mark.parametrize(
    ("options", "calls", "dtypes", "shards", "named"),
    [
        ([SAME, SAME], [{"adaptive_r": 1}, {"adaptive_r": 2}], [FLOAT64, FLOAT64], 2, "adaptive_r is 1 on rank 0, 2"),
        ([SAME, SAME], [SAME, SAME], [FLOAT64, torch.float32], 0, "dtype is torch.float64 on rank 0, torch.float32"),
        ([SAME, {"exchange": "gather"}], [SAME, SAME], [FLOAT64, FLOAT64], 0, "exchange is ragged on rank 0, gather"),
        ([SAME, SAME], [SAME, {"a2a_ffn_overlap_degree": 2}], [FLOAT64, FLOAT64], 0, "a2a_ffn_overlap_degree is 1"),
        ([SAME, SAME], [SAME, {"inequivalent_tokens": True}], [FLOAT64, FLOAT64], 0, "another collective"),
    ],
)
def test_ranks_that_differ_are_told(options: Any, calls: Any, dtypes: Any, shards: int, named: str) -> None:
    for message in run_ranks(differ, 2, options, calls, dtypes, shards):
        assert "the ranks differ" in message
        assert named in message


def joined_batch() -> list[float]:
    """The README's loop: gradients of all parameters but the marked ones are reduced."""
    case = Case(layer={"scan_expert_func": mark}, gate={"k": 2, "capacity_factor": 0.0})
    layer, twin = make_pair(case)
    ranks, rank = net.get_world_size(), net.get_world_rank()
    torch.manual_seed(3)
    tokens = torch.randn(ranks * 8, MODEL_DIM, dtype=torch.float64)
    losses = []
    for module, part in ((layer, tokens.chunk(ranks)[rank]), (twin, tokens)):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.3)
        for _ in range(4):
            optimizer.zero_grad()
            loss = (module(part) - part).square().sum() / tokens.numel()
            loss.backward()
            if module is layer:
                for parameter in module.parameters():
                    if not hasattr(parameter, "skip_allreduce"):
                        torch.distributed.all_reduce(parameter.grad)
                torch.distributed.all_reduce(loss.detach())
            optimizer.step()
            losses.append(float(loss.detach()))
    return losses


def mark(_name: str, parameter: nn.Parameter) -> None:
    parameter.skip_allreduce = True


def test_the_readme_loop_gives_the_losses_of_one_process() -> None:
    for losses in run_ranks(joined_batch, 2):
        assert losses[:4] == pytest.approx(losses[4:], rel=1e-12)
        assert losses[3] < losses[0]
    assert HIDDEN % 4 == 0  # so that four ranks can share an expert


def automatic(tokens: int) -> int:
    case = Case(-2, layer={"parallel_type": "auto"}, tokens=(tokens, 3 * tokens), gate={"k": 1, "capacity_factor": 0.0})
    check(case)
    layer, _ = make_pair(case)
    layer(torch.randn(tokens, MODEL_DIM, dtype=torch.float64))
    return layer.adaptive_degree


def test_auto_weighs_tokens_against_weights_and_links() -> None:
    slow = {"TUTEL_LINKS": "intra=1e6,inter=1e6,latency=1e-9,rate=1e12"}
    few, many = run_ranks(automatic, 2, 2, env=slow), run_ranks(automatic, 2, 500, env=slow)
    assert few == [2, 2]  # rows are fewer bytes than weights
    assert many == [0, 0]  # weights are
    assert len(set(run_ranks(automatic, 2, 20))) == 1  # measured links are agreed on


def low_level(factor: float) -> tuple[int, int]:
    rank = net.get_world_rank()
    torch.manual_seed(rank)
    scores = torch.softmax(torch.randn(10 * (rank + 1), 4), 1)
    plan, _ = moe.extract_critical(scores, 2, capacity_factor=factor, inequivalent_tokens=True)
    return plan[4], int(plan[5].max())


@pytest.mark.parametrize("factor", [0.0, 1.0, -1.0])
def test_low_level_routing_agrees_on_the_capacity(factor: float) -> None:
    (capacity, needed), (other, more) = run_ranks(low_level, 2, factor)
    assert capacity == other
    limit = 2 * 5  # K * int(|f| * ceil(S / E)) of the 20 tokens of rank 1
    assert capacity == {0.0: max(needed, more), 1.0: limit}.get(factor, capacity)
    assert capacity <= max(needed, more) or factor > 0


class Lazy(nn.Module):
    """A module that forgets its input where it has no rows."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(MODEL_DIM, MODEL_DIM).double()

    def forward(self, rows: Tensor) -> Tensor:
        output: Tensor = self.inner(rows) if len(rows) else rows.new_zeros(0, MODEL_DIM)
        return output


def forget(exchange: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """All rows go to rank 0, whose rows need a gradient from rank 1 all the same."""
    torch.manual_seed(1)
    layer = MOELayer({"type": "top", "k": 1, "capacity_factor": 0.0}, MODEL_DIM, [Lazy()], **exchange).double()
    with torch.no_grad():
        layer.gates[0].wg.weight[0] = 100.0
        layer.gates[0].wg.weight[1] = -100.0
    torch.manual_seed(7 + net.get_world_rank())
    tokens = torch.rand(4, MODEL_DIM, dtype=torch.float64, requires_grad=True)
    output = layer(tokens)
    output.sum().backward()
    return tokens.grad, output.detach()


@pytest.mark.parametrize("exchange", [{}, {"exchange": "fixed"}, {"exchange": "gather"}, {"a2a_ffn_overlap_degree": 2}])
def test_a_module_that_forgets_its_rows_keeps_nobody_waiting(exchange: dict[str, Any]) -> None:
    for grad, output in run_ranks(forget, 2, exchange, env={"TUTEL_GLOBAL_TIMEOUT_SEC": "10"}):
        assert grad.abs().sum() > 0.1
        assert output.abs().sum() > 0.1


def unlike(kind: str) -> str:
    """Ranks whose layers differ in what needs a gradient, or in their width."""
    rank = net.get_world_rank()
    wide = {"output_dim": 3 + rank} if kind == "width" else {}
    layer, _ = make_pair(Case(-2, gate={"k": 1}, experts=wide))
    if kind == "frozen":
        for name, parameter in layer.experts.named_parameters():
            parameter.requires_grad = name != ("batched_fc1_w", "batched_fc2_w")[rank]
    tokens = torch.randn(3, MODEL_DIM, dtype=torch.float64, requires_grad=kind == "input" and rank == 0)
    with pytest.raises(RankError) as caught:
        layer(tokens, adaptive_r=1).sum().backward()
    return str(caught.value)


@pytest.mark.parametrize(
    ("kind", "named"),
    [("frozen", "which parameters"), ("width", "output_dim is 3 on rank 0"), ("input", "the input needs")],
)
def test_ranks_whose_gradients_would_not_match_are_told(kind: str, named: str) -> None:
    for message in run_ranks(unlike, 2, kind):
        assert named in message


def capped() -> tuple[int, bool]:
    layer, twin = make_pair(Case(layer={"exchange": "fixed"}, gate={"capacity_factor": 1e6}))
    grouped, _ = make_pair(Case(), net.create_standalone_group())
    assert grouped.group is not None
    copied = copy.deepcopy(grouped)
    tokens = torch.randn(5, MODEL_DIM, dtype=torch.float64)
    assert torch.equal(copied(tokens), grouped(tokens))
    assert copied.group is grouped.group
    return len(layer(tokens)), bool(torch.allclose(layer(tokens), twin(tokens)))


def test_capacities_beyond_all_tokens_and_copies_of_layers() -> None:
    assert run_ranks(capped, 2) == [(5, True)] * 2


def modules_everywhere() -> str:
    with pytest.raises(
        ValueError, match=r"parallel_type='adaptive:0': r must be one of \[1\] for these experts"
    ) as error:
        MOELayer({"type": "top", "k": 1}, MODEL_DIM, [Lazy()], parallel_type="adaptive:0")
    return str(error.value)


def test_modules_of_a_user_are_not_gathered() -> None:
    assert len(run_ranks(modules_everywhere, 2)) == 2
