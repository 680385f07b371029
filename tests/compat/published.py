"""Published losses of ``helloworld`` (the project's README and issues), and its own code to compute them again."""

from typing import NamedTuple

import torch

from tutel.examples import helloworld


class Run(NamedTuple):
    """A published run: model_dim = hidden_size = 2048, 1024 tokens a sequence; its losses, step by step."""

    top: int
    num_local_experts: int
    batch_size: int
    dtype: str
    losses: tuple[float, ...]


FP32 = [
    Run(1, 1, 16, "float32", (29.98500633239746, 28.761884689331055, 27.58047866821289)),
    Run(1, 2, 16, "float32", (22.07648277282715, 21.387950897216797, 20.73025894165039)),
    Run(2, 1, 16, "float32", (29.98500633239746, 28.761884689331055, 27.58047866821289)),
    Run(2, 2, 16, "float32", (24.08013153076172, 23.29282569885254, 22.534143447875977)),
]
FP64 = Run(2, 2, 1, "float64", (27.448386457158, 16.62704052924519, 7.467060806621459))
#: The first loss of that run when rows travel in fp64; the published one was dispatched through fp32.
FP64_FIRST_LOSS = 27.448386735


def losses_of(run, num_steps, **changes):
    """Train with the example's own arguments and model, but without its printing."""
    arguments = {
        "batch_size": run.batch_size,
        "num_local_experts": run.num_local_experts,
        "top": run.top,
        "dtype": run.dtype,
        "device": "cpu",
        **changes,
    }
    options = helloworld.parse_arguments([f"--{name}={value}" for name, value in arguments.items()])
    dtype = getattr(torch, options.dtype)
    torch.set_default_dtype(dtype)
    model = helloworld.ExampleModel(options)
    torch.manual_seed(0)
    shape = (options.batch_size, options.num_tokens, options.model_dim)
    tokens = torch.randn(shape, dtype=torch.float32).to(dtype).requires_grad_()
    labels = torch.empty(options.batch_size, dtype=torch.int64).random_(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)
    losses = []
    for _ in range(num_steps):
        output, _ = model(tokens)
        loss = torch.nn.functional.nll_loss(output, labels)
        losses.append(loss.item())
        if len(losses) < num_steps:
            optimizer.zero_grad()
            tokens.grad = None
            loss.backward()
            optimizer.step()
    return losses
