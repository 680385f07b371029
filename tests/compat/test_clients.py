"""Programs of the shapes seen in public code: a gate with slots of its own, a vision model, a layer by hand."""

import copy
import math

import pytest
import torch
from reference import DTYPES, accumulator, assert_close, exact_values, leaves, random_values, wide
from torch import nn
from torch.nn import functional as F

from tutel import moe as tutel_moe

# --- A sharded layer whose top-1 gate is its own and whose dispatcher is ours -----------------------------------------


class Top1Gate(nn.Module):
    """Gives what a dispatcher needs: the loss, C (a tensor), E, ids, slots and weights; used_token masks tokens out."""

    def __init__(self, width, num_experts, capacity_factor):
        super().__init__()
        self.wg = nn.Linear(width, num_experts, bias=False)
        self.capacity_factor = capacity_factor

    def forward(self, tokens, used_token=None):
        scores = F.softmax(self.wg(tokens.to(self.wg.weight.dtype)), dim=1)
        num_tokens, num_experts = scores.shape
        capacity = torch.ceil(torch.tensor(num_tokens / num_experts * self.capacity_factor)).to(torch.int64)
        ids = torch.argmax(scores, dim=1)
        mask = F.one_hot(ids, num_classes=num_experts)
        if used_token is not None:
            mask = used_token[:, None] * mask
        loss = (scores.mean(0) * mask.to(scores.dtype).mean(0)).sum() * num_experts
        # The last tokens are served first, so that those which are dropped are not the last ones.
        slots = tutel_moe.fast_cumsum_sub_one(mask.flip(0)).flip(0)
        mask = mask * torch.lt(slots, capacity)
        # A token without an expert has the id -1.
        ids = torch.min(ids, mask.sum(dim=1) * num_experts - 1)
        slots = torch.sum(slots * mask, dim=1)
        weights = (scores * mask).sum(dim=1)
        return loss, capacity, num_experts, [ids], [slots], [weights], mask


class ShardedLayer(nn.Module):
    def __init__(self, gate, experts, *, use_tutel):
        super().__init__()
        self.gate, self.experts, self.use_tutel = gate, experts, use_tutel

    def forward(self, x, used_token=None):
        width = x.shape[-1]
        tokens = x.reshape(-1, width)
        self.l_aux, capacity, num_experts, ids, slots, weights, mask = self.gate(tokens, used_token)
        if self.use_tutel:
            if not hasattr(self, "_tutel_dispatcher"):
                self._tutel_dispatcher = tutel_moe.fast_dispatcher(
                    num_experts, capacity, width, dispatch_dtype=tokens.dtype
                )
            self._tutel_dispatcher.update(ids, slots, weights, capacity=capacity)
            dispatched = self._tutel_dispatcher.encode(tokens)
        else:
            places = mask[:, :, None] * F.one_hot(slots[0], int(capacity))[:, None]
            dispatched = torch.einsum("tec,td->ecd", places.to(accumulator(tokens.dtype)), wide(tokens)).to(
                tokens.dtype
            )
        dispatched = dispatched.reshape(1, num_experts, -1, width)
        outputs = torch.cat(
            [e(part) for e, part in zip(self.experts, dispatched.chunk(num_experts, 1), strict=True)], 1
        )
        outputs = outputs.view(num_experts, -1, width)
        if self.use_tutel:
            combined = self._tutel_dispatcher.decode(outputs.view(num_experts * capacity, width))
        else:
            factors = places * wide(weights[0])[:, None, None]
            combined = torch.einsum("tec,ecd->td", factors, wide(outputs)).to(tokens.dtype)
        return combined.reshape(x.shape)


def sharded_layer(dtype, *, use_tutel, num_experts=4, width=6, capacity_factor=1.0):
    torch.manual_seed(5)
    experts = nn.ModuleList(nn.Linear(width, width) for _ in range(num_experts)).to(dtype)
    # As there, the gate is in fp32 whatever the tokens are in.
    gate = Top1Gate(width, num_experts, capacity_factor).to(accumulator(dtype))
    return ShardedLayer(gate, experts, use_tutel=use_tutel)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_dispatcher_in_a_sharded_layer(dtype, masked):
    ours = sharded_layer(dtype, use_tutel=True)
    naive = sharded_layer(dtype, use_tutel=False)
    for shape in [(3, 7), (2, 20), (1, 1), (4, 7)]:  # one dispatcher while T and C change
        used = (torch.arange(math.prod(shape)) % 3 != 0).long() if masked else None
        (x,) = leaves(random_values((*shape, 6), dtype, seed=shape[1]))
        results = []
        for layer in (ours, naive):
            x.grad = None
            layer.zero_grad()
            output = layer(x, used)
            (output * exact_values(output.shape, dtype, seed=7)).sum().backward()
            results.append([output.detach(), x.grad, layer.gate.wg.weight.grad])
        for what, result, expected in zip(["output", "tokens", "gate"], *results, strict=True):
            tolerance = 4 * torch.finfo(dtype).eps
            torch.testing.assert_close(
                result, expected, rtol=tolerance, atol=tolerance * 16, msg=lambda m, w=what: f"{w}: {m}"
            )
        assert output.dtype == dtype


def test_a_gate_that_leaves_masked_tokens_in_slot_0():
    """A gate with a padding mask: ids stay, slot and weight become 0. Padding of zeros must not disturb the others."""
    used = torch.tensor([1, 0, 1, 1, 0, 0])
    x = random_values((6, 3)) * used[:, None]
    mask = F.one_hot(torch.tensor([0, 0, 1, 0, 1, 0]), 2) * used[:, None]
    slots = (tutel_moe.fast_cumsum_sub_one(mask) * mask).sum(1)
    weights = random_values((6,), seed=1) * used
    dispatcher = tutel_moe.fast_dispatcher(2, 3, 3, torch.float64)
    dispatcher.update([torch.tensor([0, 0, 1, 0, 1, 0])], [slots], [weights], capacity=3)
    rows = dispatcher.encode(x)
    assert torch.equal(rows, torch.stack([x[0], x[3], x[1], x[2], x[1], x[1]]))
    torch.testing.assert_close(dispatcher.decode(rows), x * weights[:, None])


# --- A vision model --------------------------------------------------------------------------------------------------

WIDTH, HIDDEN, EXPERTS = 12, 10, 4


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class MoEMlp(nn.Module):
    """A block's MLP as such models write it: a layer, a result function, a bias without gradient, a gate to read."""

    def __init__(self, gate, *, drop=0.0, fc2_bias=True, seed=0):
        super().__init__()
        self.dropout = nn.Dropout(drop)
        options = {"type": gate, "k": 1, "capacity_factor": 1.25, "gate_noise": 1.0, "fp32_gate": True}
        if gate == "cosine_top":
            options.update(proj_dim=8, init_t=0.5)
        experts = {
            "type": "ffn",
            "count_per_node": EXPERTS,
            "hidden_size_per_expert": HIDDEN,
            "activation_fn": lambda x: self.dropout(F.gelu(x)),
        }
        given = copy.deepcopy(options), dict(experts)
        with pytest.warns(DeprecationWarning, match="pad_samples"):
            self._moe_layer = tutel_moe.moe_layer(
                gate_type=options,
                model_dim=WIDTH,
                experts=experts,
                scan_expert_func=lambda name, param: setattr(param, "skip_allreduce", True),
                seeds=(1, seed + 1, seed + 1),
                batch_prioritized_routing=True,
                normalize_gate=False,
                is_gshard_loss=False,
                result_func=lambda out: (out, out.l_aux),
                parallel_type="auto",
                pad_samples=True,
                a2a_ffn_overlap_degree=2,
                group=None,
            )
        assert (options, experts) == given
        if not fc2_bias:
            self._moe_layer.experts.batched_fc2_bias.requires_grad = False

    def forward(self, x):
        return self._moe_layer(x)


class Block(nn.Module):
    def __init__(self, mlp):
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(WIDTH), mlp

    def forward(self, x):
        output = self.mlp(self.norm(x))
        output, l_aux = output if isinstance(output, tuple) else (output, None)
        return x + output, l_aux


class Vision(nn.Module):
    def __init__(self, *mlps):
        super().__init__()
        self.blocks = nn.ModuleList(Block(mlp) for mlp in mlps)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x):
        l_aux = torch.zeros(())
        for block in self.blocks:
            x, own = block(x)
            l_aux = l_aux if own is None else l_aux + own
        return self.head(x.mean(1)), l_aux


@pytest.mark.parametrize("gate", ["top", "cosine_top"])
def test_vision_model_learns(gate):
    torch.manual_seed(1)
    model = Vision(Mlp(), MoEMlp(gate, drop=0.1, fc2_bias=False), Mlp(), MoEMlp(gate, seed=7))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    images, labels = random_values((9, 5, WIDTH), torch.float32), torch.arange(9) % 3
    first, frozen = model.blocks[1].mlp._moe_layer, model.blocks[1].mlp._moe_layer.experts.batched_fc2_bias
    before = frozen.detach().clone()
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        logits, l_aux = model(images)
        assert l_aux.requires_grad
        loss = F.cross_entropy(logits, labels) + 0.01 * l_aux
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert frozen.grad is None
    assert torch.equal(frozen, before)
    assert model.blocks[3].mlp._moe_layer.experts.batched_fc2_bias.grad is not None
    marked = {name for name, parameter in model.named_parameters() if hasattr(parameter, "skip_allreduce")}
    assert marked == {name for name, _ in model.named_parameters() if ".experts." in name}
    if gate == "top":
        assert first.gates[0].wg.weight.shape == (EXPERTS, WIDTH)
        assert first.gates[0].wg.weight.dtype == torch.float32
        assert first.gates[0].wg.weight.grad.abs().max() > 0
    else:
        assert first.gates[0].temperature.shape == (1,)
        assert first.gates[0].sim_matrix.grad.abs().max() > 0

    model.eval()
    logits, _ = model(images)
    assert torch.equal(model(images)[0], logits), "nothing is drawn in evaluation"
    assert logits.argmax(1).eq(labels).float().mean() > 0.6
    restored = Vision(Mlp(), MoEMlp(gate), Mlp(), MoEMlp(gate))
    restored.load_state_dict(model.state_dict())
    assert torch.equal(restored.eval()(images)[0], logits)


# --- A layer of one's own, from the low-level functions --------------------------------------------------------------


@pytest.mark.parametrize("capacity_factor", [0, 1.0, -0.5])
def test_layer_from_scratch_is_the_layer(capacity_factor):
    layer = tutel_moe.moe_layer(
        gate_type={"type": "top", "k": 2, "capacity_factor": capacity_factor},
        model_dim=WIDTH,
        experts={"type": "ffn", "count_per_node": EXPERTS, "hidden_size_per_expert": HIDDEN, "activation_fn": F.relu},
        seeds=(1, 2, 3),
    ).to(torch.float64)
    experts = layer.experts

    def scratch(x):
        scores = F.softmax(layer.gates[0].wg(x), dim=-1)
        crit, l_aux = tutel_moe.top_k_routing(scores, top_k=2, capacity_factor=capacity_factor)
        y = tutel_moe.fast_encode(x, crit)
        y = F.relu(torch.bmm(y, experts.batched_fc1_w.transpose(1, 2)) + experts.batched_fc1_bias[:, None])
        y = torch.bmm(y, experts.batched_fc2_w) + experts.batched_fc2_bias[:, None]
        return tutel_moe.fast_decode(y, crit), l_aux

    (x,) = leaves(random_values((21, WIDTH)))
    results = []
    for function in (scratch, lambda x: (layer(x), layer.l_aux)):
        output, l_aux = function(x)
        loss = F.nll_loss(F.log_softmax(output, dim=1), torch.zeros(21, dtype=torch.int64)) + 0.1 * l_aux
        results.append([output, *torch.autograd.grad(loss, [x, *layer.parameters()])])
        assert l_aux.dtype == torch.float64
    for ours, expected in zip(*results, strict=True):
        # The layer's loss counts first choices in fp32.
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-9)
    assert_close("output", results[0][0].detach(), results[1][0].detach(), results[1][0].detach())
