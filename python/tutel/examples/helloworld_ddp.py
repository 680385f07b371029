"""Train helloworld's layer under PyTorch's data parallelism: ``python3 -m tutel.examples.helloworld_ddp``.

``DistributedDataParallel`` averages the gate's gradient over the ranks; experts, which differ between them, it ignores.
"""

import contextlib
from collections.abc import Sequence

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tutel.distributed.gradients import ignore_experts

from tutel.examples import _shared, helloworld


def data_parallel(model: nn.Module, at_end: contextlib.ExitStack) -> nn.Module:
    """Wrap a model; one process alone gets the group that the wrapper asks for, until the end."""
    from torch import distributed

    if not distributed.is_initialized():
        backend = "nccl" if next(model.parameters()).is_cuda else "gloo"
        store = distributed.HashStore()  # type: ignore[attr-defined]
        distributed.init_process_group(backend, store=store, rank=0, world_size=1)
        at_end.callback(distributed.destroy_process_group)
    ignore_experts(model)
    return DistributedDataParallel(model)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program."""
    options = helloworld.parse_arguments(arguments, __doc__)
    # Gradients are reduced by the wrapper.
    options.allreduce_degree = 0
    with contextlib.ExitStack() as at_end:
        _shared.run(options, helloworld.ExampleModel, wrap=lambda model: data_parallel(model, at_end))


if __name__ == "__main__":
    main()
