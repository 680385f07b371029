"""Train several replicas of helloworld's layer: ``python3 -m tutel.examples.helloworld_data_model --group_count=2``.

The ranks are divided into groups of neighbours. Each group holds all experts, divided among its ranks (model parallel);
ranks with the same place in their groups hold the same experts, and sum their gradients (data parallel).
"""

import argparse
from collections.abc import Sequence

from torch import Tensor, nn
from torch.optim import Optimizer

from tutel import net, system
from tutel.examples import _shared, helloworld


def replica(options: argparse.Namespace) -> nn.Module:
    """Make the model, whose tokens stay within this rank's group."""
    return helloworld.ExampleModel(options, system.get_local_session().model_group)


def step_of_replicas(options: argparse.Namespace) -> _shared.Step:
    """Make the step: the gate's gradients are summed over all ranks, those of an expert over its replicas."""

    def step(model: nn.Module, optimizer: Optimizer, tokens: Tensor, labels: Tensor) -> Tensor:
        loss = _shared.loss_of(options, model, tokens, labels)
        if not options.eval:
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            _shared.reduce_shared_gradients(options, model)
            reduce_gradients_of_replicas(options, model)
            optimizer.step()
        return loss

    return step


def reduce_gradients_of_replicas(options: argparse.Namespace, model: nn.Module) -> None:
    """Sum the gradients of experts over the ranks that hold the same ones."""
    if options.allreduce_degree == 0:
        return
    replicas = system.get_local_session().data_group
    for parameter in model.parameters():
        if hasattr(parameter, "skip_allreduce") and parameter.grad is not None:
            net.simple_all_reduce(parameter.grad, group=replicas, inplace=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program."""
    parser = helloworld.argument_parser(__doc__)
    parser.add_argument(
        "--group_count", type=int, default=1, help="replicas of the model, a divisor of the ranks; -n: of n ranks each"
    )
    options = _shared.parse(parser, arguments)
    _shared.run(options, replica, step=step_of_replicas(options), group_count=options.group_count)


if __name__ == "__main__":
    main()
