"""Train helloworld's layer by the optimizer that reduces gradients: ``python3 -m tutel.examples.helloworld_ddp_tutel``.

Each rank keeps the optimizer's state of its experts and of its part of the gate; the gate's gradient is averaged.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import nn
from torch.optim import Optimizer

from tutel import net
from tutel.examples import _shared, helloworld


def distributed_sgd(model: nn.Module) -> Optimizer:
    """Make an SGD that is divided among the ranks."""
    optimizer = net.TutelDistributedOptimizer(model.parameters(), average_shared=True)
    # No Optimizer, but it has the methods that a loop calls.
    return cast(Optimizer, optimizer.warp_local(torch.optim.SGD, lr=_shared.LEARNING_RATE))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program."""
    options = helloworld.parse_arguments(arguments, __doc__)
    # Gradients are reduced by the optimizer.
    options.allreduce_degree = 0
    _shared.run(options, helloworld.ExampleModel, make_optimizer=distributed_sgd)


if __name__ == "__main__":
    main()
