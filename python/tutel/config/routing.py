"""How logits become a plan."""

from dataclasses import dataclass

from tutel.errors import check_int, check_number


@dataclass(frozen=True)
class RoutingConfig:
    """How logits become a :class:`tutel.route.RoutePlan`.

    Attributes:
        top_k: Experts a token, at least 1; a layer limits it to its number of experts.
        capacity_factor: f in the capacity C of an expert, see :func:`tutel.route.drop_threshold`.
        normalize: Divide the weights of a token by their sum (for top_k > 1 only).
        prioritized: Serve tokens in descending order of their largest score, instead of in their own order.
        gate_noise: s, in training: s / num_experts times standard normal noise is added to the logits.
    """

    top_k: int = 1
    capacity_factor: float = 1.0
    normalize: bool = True
    prioritized: bool = False
    gate_noise: float = 0.0

    def __post_init__(self) -> None:
        """Check the numbers."""
        check_int("top_k", self.top_k, at_least=1)
        check_number("capacity_factor", self.capacity_factor)
        check_number("gate_noise", self.gate_noise, at_least=0.0)
