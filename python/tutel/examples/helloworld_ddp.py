"""Train helloworld's layer under PyTorch's data parallelism: ``python3 -m tutel.examples.helloworld_ddp``.

``DistributedDataParallel`` averages the gate's gradient over the ranks; experts, which differ between them, it ignores.
"""

from collections.abc import Sequence

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tutel.distributed.gradients import ignore_experts

from tutel.examples import _shared, helloworld


def data_parallel(model: nn.Module) -> nn.Module:
    """Wrap a model; one process alone makes the group of one that the wrapper asks for."""
    from torch import distributed

    if not distributed.is_initialized():
        backend = "nccl" if next(model.parameters()).is_cuda else "gloo"
        distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)
    ignore_experts(model)
    # The only buffer is a constant.
    return DistributedDataParallel(model, broadcast_buffers=False)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program."""
    options = helloworld.parse_arguments(arguments, __doc__)
    # Gradients are reduced by the wrapper.
    options.allreduce_degree = 0
    _shared.run(options, helloworld.ExampleModel, wrap=data_parallel)


if __name__ == "__main__":
    main()
