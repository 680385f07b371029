"""Train helloworld's layer in mixed precision: ``python3 -m tutel.examples.helloworld_amp``.

Weights stay in ``--dtype``; products are computed in float16 on a GPU, with scaled gradients, and in bfloat16 on a CPU.
"""

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tutel.distributed import agree_on_overflow

from tutel.examples import _shared, helloworld


def amp_step(options: argparse.Namespace) -> _shared.Step:
    """Make the step: the forward pass under autocast, gradients scaled where the products are in float16."""
    on_cuda = options.device == "cuda"
    low_precision = torch.float16 if on_cuda else torch.bfloat16
    scaler = torch.amp.GradScaler(options.device, enabled=on_cuda)

    def step(model: nn.Module, optimizer: Optimizer, tokens: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(options.device, dtype=low_precision):
            loss = _shared.loss_of(options, model, tokens, labels)
        if not options.eval:
            optimizer.zero_grad()
            scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            _shared.reduce_shared_gradients(options, model)
            agree_on_overflow(scaler, optimizer)
            scaler.step(optimizer)
            scaler.update()
        return loss

    return step


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program."""
    options = helloworld.parse_arguments(arguments, __doc__)
    _shared.run(options, helloworld.ExampleModel, step=amp_step(options))


if __name__ == "__main__":
    main()
