"""States that do not fit together, and arguments that mean nothing: refused, with the names of ranks and keys."""

import pytest
import torch
from test_checkpoint_states import FFN, GLU, shares, whole_layer
from tutel.checkpoint import CheckpointError, gather_states, scatter_state


def ranks_of(count=2):
    return shares(whole_layer(FFN).state_dict(), count)


def test_shared_values_must_be_the_same():
    ranks = ranks_of()
    ranks[1]["gates.0.wg.weight"] = ranks[1]["gates.0.wg.weight"] + 1
    with pytest.raises(CheckpointError, match=r"not the same on all ranks: gates\.0\.wg\.weight \(allow_different"):
        gather_states(ranks)
    first = gather_states(ranks, allow_different="first")
    assert torch.equal(first["gates.0.wg.weight"], ranks[0]["gates.0.wg.weight"])
    assert "gates.0.wg.weight" not in gather_states(ranks, allow_different="drop")
    ranks = ranks_of()
    for own, zero in zip(ranks, (0.0, -0.0), strict=True):
        own["gates.0.wg.weight"] = torch.tensor([zero, float("nan")])
    with pytest.raises(CheckpointError, match="not the same"):  # to the bit
        gather_states(ranks)


BROKEN = {
    "key": (lambda ranks: ranks[1].pop("experts.batched_fc2_w"), r"incomplete: rank 1 lacks experts\.batched_fc2_w$"),
    "several": (
        lambda ranks: (ranks[0].pop("experts.batched_fc1_w"), ranks[1].pop("experts.batched_fc2_w")),
        r"(?s)incomplete:\n  rank 0 lacks experts\.batched_fc1_w\n  rank 1 lacks experts\.batched_fc2_w$",
    ),
    "count": (
        lambda ranks: ranks[1].update(_num_global_experts=torch.tensor(2)),
        r"rank 1: the layer has 2 experts, but 4 in rank 0",
    ),
    "no count": (
        lambda ranks: ranks[1].update(_num_global_experts=torch.ones(2)),
        r"rank 1: '_num_global_experts' must be the number of experts, got tensor",
    ),
    "zero": (
        lambda ranks: [own.update(_num_global_experts=torch.tensor(0)) for own in ranks],
        r"must be the number of experts, got 0",
    ),
    "no layer": (
        lambda ranks: [own.pop("_num_global_experts") for own in ranks],
        r"no Mixture-of-Experts layer found: .*default_num_global_experts.*namespace",
    ),
    "shape": (
        lambda ranks: ranks[1].update({"experts.batched_fc1_bias": torch.ones(2, 9)}),
        r"experts\.batched_fc1_bias: rank 1 has torch\.float32 \[2, 9\], but rank 0 torch\.float32 \[2, 8\]",
    ),
    "dtype": (
        lambda ranks: ranks[1].update({"experts.batched_fc1_bias": torch.ones(2, 8).double()}),
        r"rank 1 has torch\.float64",
    ),
    "no tensor": (lambda ranks: ranks[1].update({"experts.batched_fc1_bias": 3}), r"rank 1 has int, but rank 0"),
    "too many experts": (
        lambda ranks: [own.update({"experts.batched_fc1_w": torch.ones(4, 8, 6)}) for own in ranks],
        r"experts\.batched_fc1_w: its shape is \[4, 8, 6\], but a rank holds 2 of 4 experts",
    ),
    "rank": (lambda ranks: ranks.append(ranks[0]), r"the layer: 4 experts cannot be divided over 3 ranks"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_sets_that_do_not_fit_together(name):
    spoil, message = BROKEN[name]
    ranks = ranks_of()
    spoil(ranks)
    with pytest.raises(CheckpointError, match=message):
        gather_states(ranks)


def test_shares_that_do_not_fit_together():
    ranks = ranks_of(8)
    for own in ranks:
        own["experts.batched_fc2_bias"] = torch.ones(1, 2)
    with pytest.raises(CheckpointError, match="a rank's share of 5 values must be 3, got 2"):
        gather_states(ranks)
    for own in ranks:
        own["experts.batched_fc2_bias"] = torch.ones(1)
    with pytest.raises(CheckpointError, match=r"batched_fc2_bias: a shape \[1\] cannot be joined along dimension 1"):
        gather_states(ranks)


def test_states_that_cannot_be_divided():
    state = whole_layer(FFN).state_dict()
    with pytest.raises(CheckpointError, match="the layer: 4 experts cannot be divided over 3 ranks"):
        scatter_state(state, 3, 0)
    with pytest.raises(CheckpointError, match="dimension 1 of size 8 cannot be cut into 3 equal pieces"):
        scatter_state(state, 12, 0)
    glu = whole_layer(GLU).state_dict()
    with pytest.raises(CheckpointError, match="of size 16 cannot be cut into 2 blocks of 16 equal pieces"):
        scatter_state(glu, 64, 0)
    state["experts.batched_fc1_w"] = torch.ones(3, 8, 6)
    with pytest.raises(CheckpointError, match=r"its shape is \[3, 8, 6\], but there are 4 experts"):
        scatter_state(state, 2, 0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gather_states([]), "states must hold the state of at least one rank"),
        (lambda: gather_states(ranks_of(), layout="v2"), "layout must be None, 'batched', .* got 'v2'"),
        (lambda: gather_states(ranks_of(), allow_different="all"), "allow_different must be None, 'first' or 'drop'"),
        (
            lambda: gather_states(ranks_of(), default_num_global_experts=0),
            "default_num_global_experts must be at least 1",
        ),
        (lambda: scatter_state(ranks_of()[0], 2, 2), r"rank must be below world_size \(2\), got 2"),
        (lambda: scatter_state(ranks_of()[0], 0, 0), "world_size must be at least 1"),
        (lambda: scatter_state(ranks_of()[0], 1, -1), "rank must be at least 0"),
    ],
)
def test_arguments_are_checked(call, message):
    with pytest.raises(ValueError, match=message):
        call()
