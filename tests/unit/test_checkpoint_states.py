"""States of W ranks into one and back: `gather_states` and `scatter_state`."""

import pytest
import torch
from reference import random_values
from torch import nn
from tutel.checkpoint import CheckpointError, gather_states, scatter_state

from tutel import moe

D, H, D_OUT, E = 6, 8, 5, 4
FFN = {"type": "ffn", "hidden_size_per_expert": H, "output_dim": D_OUT}
LLAMA = {"type": "llama_ffn", "hidden_size_per_expert": H}
GLU = {**FFN, "fc1_copies": 2, "activation_fn": lambda x: x[..., :H] * x[..., H:]}


def whole_layer(experts, count=E, dtype=torch.float32):
    """One rank with all experts: what every conversion starts from or ends in."""
    torch.set_default_dtype(dtype)
    layer = moe.moe_layer({"type": "top", "k": 2}, D, {**experts, "count_per_node": count}, seeds=(1, 2, 3))
    torch.set_default_dtype(torch.float32)
    for index, parameter in enumerate(layer.experts.parameters()):
        with torch.no_grad():
            parameter.copy_(random_values(parameter.shape, dtype, seed=index))
    return layer


def shares(state, ranks, count=E, *, copies=1, width=D_OUT):
    """Each rank's state, written down by hand: the naive twin."""
    result = []
    for rank in range(ranks):
        own = dict(state)
        for key, value in state.items():
            if "experts." not in key:
                continue
            if ranks <= count:
                e = count // ranks
                own[key] = torch.stack([value[rank * e + i] for i in range(e)])
                continue
            n = ranks // count
            expert, shard = value[rank // n], rank % n
            units = [copy * H + shard * (H // n) + unit for copy in range(copies) for unit in range(H // n)]
            name = key.split("experts.")[1]
            if name in ("batched_fc1_w", "batched_fc1_bias"):
                piece = expert[units]
            elif name == "batched_fc2_bias":
                size = (width + n - 1) // n
                padded = torch.cat([expert, expert.new_zeros(n * size - width)])
                piece = padded[shard * size : (shard + 1) * size]
            elif name in ("W_fc1", "W_fc2"):
                piece = expert[:, units]
            else:
                piece = expert[units[: H // n]]
            own[key] = piece[None]
        result.append(own)
    return result


def assert_same_state(left, right):
    assert list(left) == list(right)
    for key, value in left.items():
        assert value.dtype == right[key].dtype, key
        assert torch.equal(value, right[key]), key


@pytest.mark.parametrize("ranks", [1, 2, 4, 8, 16])
@pytest.mark.parametrize(("experts", "copies"), [(FFN, 1), (LLAMA, 1), (GLU, 2)], ids=["ffn", "llama", "glu"])
def test_there_and_back(experts, copies, ranks):
    layer = whole_layer(experts)
    state = layer.state_dict()
    expected = shares(state, ranks, copies=copies)
    for rank in range(ranks):
        assert_same_state(scatter_state(state, ranks, rank), expected[rank])
    gathered = gather_states(expected)
    assert_same_state(gathered, state)
    other = whole_layer(experts)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(gathered, strict=True)
    tokens = random_values((7, D), torch.float32)
    assert torch.equal(other(tokens), layer(tokens))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ranks", [2, 8])
def test_every_dtype_keeps_its_bits(dtype, ranks):
    state = whole_layer(FFN, dtype=dtype).state_dict()
    state["experts.batched_fc1_w"][0, 0, 0] = float("nan")
    gathered = gather_states(shares(state, ranks))
    for key, value in state.items():
        assert gathered[key].dtype == value.dtype
        assert torch.equal(
            gathered[key].view(torch.uint8) if value.dim() else value, value.view(torch.uint8) if value.dim() else value
        )


@pytest.mark.parametrize("ranks", [2, 8])
def test_layers_within_a_model(ranks):
    """Two layers of different sizes; the rest of the model and what is no tensor go along."""
    first, second = whole_layer(FFN), whole_layer(LLAMA, count=8)
    model = nn.ModuleDict({"a": first, "b": nn.Sequential(nn.Linear(D, D), second)})
    state = model.state_dict()
    one = shares({key: value for key, value in state.items() if key.startswith("a.")}, ranks)
    two = shares({key: value for key, value in state.items() if key.startswith("b.")}, ranks, 8)
    ranks_states = [{**left, **right, "epoch": 3} for left, right in zip(one, two, strict=True)]
    assert_same_state({k: v for k, v in gather_states(ranks_states).items() if k != "epoch"}, state)
    assert gather_states(ranks_states)["epoch"] == 3
    for rank in range(ranks):
        share = scatter_state({**state, "epoch": 3}, ranks, rank)
        assert share.pop("epoch") == 3
        assert_same_state(share, {key: ranks_states[rank][key] for key in share})


def test_lists_of_modules():
    layer = moe.moe_layer({"type": "top"}, D, [nn.Linear(D, D) for _ in range(E)])
    state = layer.state_dict()
    ranks = [scatter_state(state, 2, rank) for rank in range(2)]
    assert torch.equal(ranks[1]["experts.0.weight"], state["experts.2.weight"])
    assert [key for key in ranks[1] if "weight" in key and "experts" in key] == ["experts.0.weight", "experts.1.weight"]
    gathered = gather_states(ranks)
    assert gathered.keys() == state.keys()
    assert all(torch.equal(gathered[key], state[key]) for key in state)
    with pytest.raises(CheckpointError, match="a module cannot be shared by 2 ranks"):
        scatter_state(state, 8, 0)


# --- Custom experts -------------------------------------------------------------------------------------------------


def custom(**tensors):
    return {"_num_global_experts": torch.tensor(2), **{f"experts.{name}": value for name, value in tensors.items()}}


def test_custom_experts_are_cut_where_the_caller_says():
    state = custom(w=random_values((2, 3, 4)), scale=torch.tensor(2.0))
    assert torch.equal(scatter_state(state, 2, 1)["experts.w"], state["experts.w"][1:])
    with pytest.raises(CheckpointError, match=r"experts\.w: 2 ranks would share an expert.*shard_dims"):
        scatter_state(state, 4, 0)
    ranks = [scatter_state(state, 4, rank, shard_dims={"w": 2}) for rank in range(4)]
    assert torch.equal(ranks[3]["experts.w"], state["experts.w"][1:, :, 2:])
    assert_same_state(
        gather_states(ranks, shard_dims={"w": 2}), {k: state[k] for k in gather_states(ranks, shard_dims={"w": 2})}
    )
    with pytest.raises(CheckpointError, match=r"experts\.w: 2 ranks share an expert.*shard_dims"):
        gather_states(ranks)
    with pytest.raises(CheckpointError, match="dimension 1 of size 3 cannot be cut into 2 equal pieces"):
        scatter_state(state, 4, 0, shard_dims={"w": 1})
    with pytest.raises(CheckpointError, match="has no dimension 7"):
        scatter_state(state, 4, 0, shard_dims={"w": 7})
    with pytest.raises(ValueError, match=r"shard_dims\['w'\] must be at least 1, got 0"):
        scatter_state(state, 4, 0, shard_dims={"w": 0})


def test_numbers_that_may_be_experts_or_not():
    state = custom(**{"0.w": torch.ones(2, 3), "1.w": torch.ones(2, 3)})
    with pytest.raises(CheckpointError, match="a list of modules or tensors of all 2: say which by layout"):
        scatter_state(state, 2, 0)
    assert list(scatter_state(state, 2, 0, layout="modules")) == ["_num_global_experts", "experts.0.w"]
    assert scatter_state(state, 2, 0, layout="batched")["experts.1.w"].shape == (1, 3)


# --- Tensor parallelism ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_megatron(ranks, copies):
    """Every rank computes all tokens by its hidden units, bias included, and the outputs are added."""
    options = {**FFN, "fc1_copies": copies, "activation_fn": torch.relu if copies == 1 else nn.GLU()}
    parts = [moe.moe_layer({"type": "megatron"}, D, options) for _ in range(ranks)]
    tokens = random_values((7, D), torch.float32)
    expected = sum(part(tokens) for part in parts)
    states = [{**part.state_dict(), "_num_global_experts": torch.tensor(ranks)} for part in parts]
    gathered = gather_states(states, layout="megatron")
    whole = moe.moe_layer({"type": "megatron"}, D, {**options, "hidden_size_per_expert": H * ranks})
    whole.load_state_dict(gathered, strict=True)
    torch.testing.assert_close(whole(tokens), expected)
    for rank, part in enumerate(parts):
        share = scatter_state(gathered, ranks, rank, layout="megatron")
        assert share["_num_global_experts"] == ranks
        part.load_state_dict({**share, "_num_global_experts": torch.tensor(1)}, strict=True)
    torch.testing.assert_close(sum(part(tokens) for part in parts), expected)


def test_megatron_is_never_guessed():
    """Without a gate in the state, one expert a rank may be a part of one."""
    message = r"layer 'moe' has no gate .* say which by layout \(--layout\): 'batched' or 'megatron'"
    whole = whole_layer(FFN, count=2).state_dict()
    state = {f"moe.{key}": value for key, value in whole.items() if "gates" not in key}
    ranks = shares(state, 2, count=2)
    with pytest.raises(CheckpointError, match=message):
        gather_states(ranks)
    assert_same_state(gather_states(ranks, layout="batched"), state)
    joined = gather_states(ranks, layout="megatron")
    assert joined["moe.experts.batched_fc1_w"].shape == (1, 2 * H, D)
    with pytest.raises(CheckpointError, match=message):
        scatter_state(joined, 2, 0)
    assert scatter_state(joined, 2, 0, layout="batched")["moe._num_global_experts"] == 1
    # What cannot be parts of one expert is no question: a single rank, another number of ranks, other experts.
    assert_same_state(gather_states([joined]), joined)
    assert_same_state(scatter_state(joined, 1, 0), joined)
    assert_same_state(gather_states(shares(state, 4, count=2)), state)
    llama = {key: value for key, value in whole_layer(LLAMA, count=2).state_dict().items() if "gates" not in key}
    assert_same_state(gather_states(shares(llama, 2, count=2)), llama)


def test_what_is_no_megatron():
    state = whole_layer(FFN).state_dict()
    assert_same_state(gather_states(shares(state, 2), layout="megatron"), state)  # it has a gate
    del state["gates.0.wg.weight"]
    with pytest.raises(CheckpointError, match="the layer: 2 ranks have 4 parts of an expert"):
        gather_states(shares(state, 2), layout="megatron")
    with pytest.raises(CheckpointError, match="only one expert can be cut into parts, got 4"):
        scatter_state(state, 2, 0, layout="megatron")


# --- Older versions -------------------------------------------------------------------------------------------------


def old_ranks(state, ranks, layout):
    """Each rank's experts by the older names; every rank that shares an expert has a bias of its own."""
    n = max(ranks // E, 1)
    result = []
    for rank, own in enumerate(shares(state, ranks, width=D)):
        fc1, fc2 = own["experts.batched_fc1_w"], own["experts.batched_fc2_w"]
        b1, b2 = own["experts.batched_fc1_bias"], own["experts.batched_fc2_bias"]
        if n > 1:
            whole = state["experts.batched_fc2_bias"][rank // n : rank // n + 1]
            b2 = whole * (2 if rank % n == 0 else -1 / (n - 1))
        fc1 = fc1.transpose(1, 2).contiguous() if layout == "v0.1.4" else fc1
        old = {"fc1_weight": fc1, "fc2_weight": fc2, "fc1_bias": b1[:, None], "fc2_bias": b2[:, None]}
        if layout == "v0.1.4" and len(fc1) == 1:
            old = {name: value[0] for name, value in old.items()}
        result.append(
            {"moe.gates.0.wg.weight": own["gates.0.wg.weight"], **{f"moe.experts.0.{k}": v for k, v in old.items()}}
        )
    return result


@pytest.mark.parametrize("layout", ["v0.1.4", "v0.1.5"])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_older_layouts(layout, ranks):
    state = whole_layer({**FFN, "output_dim": D}).state_dict()
    old = old_ranks(state, ranks, layout)
    with pytest.warns(UserWarning, match=f"the experts of layer 'moe' are in the layout of {layout}"):
        gathered = gather_states(old, default_num_global_experts=E)
    explicit = gather_states(old, default_num_global_experts=E, layout=layout)
    for key, value in state.items():
        torch.testing.assert_close(gathered[f"moe.{key}"], value)
        assert torch.equal(gathered[f"moe.{key}"], explicit[f"moe.{key}"])
    if ranks == 1:  # a whole file is divided as well
        share = scatter_state(old[0], 2, 1, default_num_global_experts=E, layout=layout)
        expected = shares(state, 2, width=D)[1]
        assert all(torch.equal(share[f"moe.{key}"], expected[key]) for key in expected)


def test_an_older_layout_is_never_guessed():
    square = {"experts.0.fc1_weight": torch.ones(2, 6, 6), "experts.0.fc2_weight": torch.ones(2, 6, 6)}
    with pytest.raises(CheckpointError, match=r"fit both 'v0\.1\.4' and 'v0\.1\.5'; say which by layout"):
        gather_states([square], default_num_global_experts=2)
    odd = {**square, "experts.0.fc1_weight": torch.ones(2, 7, 7)}
    with pytest.raises(CheckpointError, match="fit neither"):
        scatter_state(odd, 2, 0, default_num_global_experts=2)


@pytest.mark.parametrize("ranks", [2, 4, 8, 12, 20])
def test_flat_llama_weights(ranks):
    state = whole_layer(LLAMA).state_dict()
    n = max(ranks // E, 1)
    flat = []
    for rank in range(ranks):
        own = dict(state)
        for key in [key for key in state if "experts." in key]:
            if n == 1:
                e = E // ranks
                own[key] = state[key][rank * e : (rank + 1) * e].reshape(-1)
            else:
                values = state[key][rank // n].reshape(-1)
                size = -(-values.numel() // n)
                own[key] = torch.cat([values, values.new_zeros(n * size - values.numel())])[rank % n * size :][:size]
        flat.append(own)
    assert_same_state(gather_states(flat), state)
    without_gate = [{key: value for key, value in own.items() if "gates" not in key} for own in flat]
    assert torch.equal(gather_states(without_gate, model_dim=D)["experts.W_fc3"], state["experts.W_fc3"])
    if n == 1:  # flat they may stay: a layer that loads them reshapes them
        assert gather_states(without_gate)["experts.W_fc1"].shape == (E, D * H)
    else:
        with pytest.raises(CheckpointError, match="needs model_dim to tell where it ends"):
            gather_states(without_gate)
    with pytest.raises(CheckpointError, match="is none of 1 experts with model_dim 1000" if n > 1 else "is none of"):
        gather_states(flat, model_dim=1000)
