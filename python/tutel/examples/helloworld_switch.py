"""Switch the layer's settings at every step, at no cost: ``python3 -m tutel.examples.helloworld_switch``.

The end of a step's line shows them: ``(f = capacity factor, r = adaptive_r, o = overlap degree)``.
"""

import argparse
from collections.abc import Sequence

from torch import Tensor, nn

from tutel.examples import _shared, helloworld

#: What the capacity factor of the command line is multiplied by, in turn.
CAPACITY_STEPS = (1.0, 1.25, 1.5, 2.0)
OVERLAP_DEGREES = range(1, 9)


class SwitchingModel(helloworld.ExampleModel):
    """Helloworld's model, which goes to the next settings at each forward.

    Attributes:
        setting: (capacity_factor, adaptive_r, overlap degree) of the last forward.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        self.capacity_factors = [options.capacity_factor * step for step in CAPACITY_STEPS]
        self.forwards = 0
        self.setting = (options.capacity_factor, 1, 1)

    def forward(self, tokens: Tensor, **overrides: object) -> tuple[Tensor, Tensor]:
        """Give log-probabilities [batch, tokens] of tokens [batch, tokens, D], and the auxiliary loss."""
        turn = self.forwards
        self.forwards += 1
        degrees = self._moe_layer.valid_rs
        # Each setting turns when the one before has been through, so that all combinations come up.
        factor = self.capacity_factors[turn // (len(degrees) * len(OVERLAP_DEGREES)) % len(self.capacity_factors)]
        self.setting = (
            factor,
            degrees[turn % len(degrees)],
            OVERLAP_DEGREES[turn // len(degrees) % len(OVERLAP_DEGREES)],
        )
        capacity_factor, adaptive_r, overlap_degree = self.setting
        return super().forward(
            tokens,
            capacity_factor=capacity_factor,
            adaptive_r=adaptive_r,
            a2a_ffn_overlap_degree=overlap_degree,
            **overrides,
        )


def describe_setting(model: nn.Module) -> str:
    """Write the settings of the last forward."""
    assert isinstance(model, SwitchingModel)
    return " (f = {}, r = {}, o = {})".format(*model.setting)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program."""
    _shared.run(helloworld.parse_arguments(arguments, __doc__), SwitchingModel, remark=describe_setting)


if __name__ == "__main__":
    main()
