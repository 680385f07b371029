"""Who gets the rows: tokens whose first E features are the logits that they are meant to have."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benches.workloads.layer import Sizes
from benches.workloads.layer_work import without_ties

#: A logit that is never among the chosen; small enough to be an ordinary value of a token.
_NEVER = -24.0


def uniform(experts: int) -> Tensor:
    """Return equal chances: logarithms of probabilities, as all of these do."""
    return torch.zeros(experts)


def zipf(experts: int) -> Tensor:
    """Return chances that fall with an expert's rank to the power of 1.2."""
    return -1.2 * torch.arange(1, experts + 1).log()


def one_hot(experts: int) -> Tensor:
    """Return chances of 90 % for the first, and of equal shares of the rest for the others."""
    chances = torch.full((experts,), 0.1 / (experts - 1)).log()
    chances[0] = torch.tensor(0.9).log()
    return chances


def half_empty(experts: int) -> Tensor:
    """Return chances of which every other one is nil."""
    chances = torch.zeros(experts)
    chances[1::2] = _NEVER
    return chances


def tokens_with(chances: Callable[[int], Tensor], sizes: Sizes) -> Tensor:
    """Draw tokens [1, T, D], D at least E, that choose by these chances under ``aim_gate``'s gate.

    Random numbers after Gumbel, added to the logarithm of chances: the largest is a draw by these chances, and the
    next ones are draws among those left.
    """
    generator = torch.Generator().manual_seed(0)
    count = sizes.batch * sizes.tokens
    drawn = torch.randn(2 * count + 64, sizes.width, generator=generator)
    noise = -torch.rand(drawn.shape[0], sizes.experts, generator=generator).clamp(min=1e-9).log().neg().log()
    # Nobody draws an expert without a chance, whatever the noise.
    noise = noise.clamp(max=-_NEVER / 2)
    drawn[:, : sizes.experts] = chances(sizes.experts) + noise
    drawn = drawn.to(sizes.dtype)
    # In fp32 the logits are exact: each is one feature.
    kept = without_ties(drawn, drawn[:, : sizes.experts].float(), sizes.top_k, count)
    return kept.view(1, count, sizes.width)


@torch.no_grad()
def aim_gate(layers: dict[str, nn.Module]) -> None:
    """Make every gate read a token's logits off its first features."""
    for name, layer in layers.items():
        weight = layer.get_parameter("gates.0.wg.weight" if name == "tutel" else "gate.weight")
        weight.zero_()
        weight.fill_diagonal_(1.0)
