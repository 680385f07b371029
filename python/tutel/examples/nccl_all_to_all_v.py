"""Exchange parts of different sizes between all ranks: ``python3 -m tutel.examples.nccl_all_to_all_v``.

Each rank sends to each other rank as many elements as the two agree on by their numbers, of two tensors in one call,
and checks what it receives. NCCL on GPUs, Gloo on CPUs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tutel import net, system
from tutel.examples import _shared


def share(source: int, target: int, elements: int) -> int:
    """Return how many elements one rank sends to another: from 0 up, and different both ways."""
    return elements * ((2 * source + target) % 4) // 3


def content(source: int, target: int, elements: int) -> Tensor:
    """Return what one rank sends to another: numbers that tell where they come from and where they belong."""
    count = share(source, target, elements)
    return torch.arange(count, dtype=torch.float64) + 1e6 * (1000 * source + target)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program; a wrong element is an error."""
    parser = _shared.bare_argument_parser(__doc__)
    parser.add_argument("--elements", type=int, default=1000, help="the largest part")
    parser.add_argument("--num_loops", type=int, default=20, help="calls that are measured")
    options = _shared.parse(parser, arguments)
    session, device = _shared.start(options)
    rank, ranks = session.global_rank, range(session.global_size)

    data = torch.cat([content(rank, target, options.elements) for target in ranks]).to(device)
    parts = [share(rank, target, options.elements) for target in ranks]
    (received, negated), sizes = net.batch_all_to_all_v([data, -data], parts)

    expected = torch.cat([content(source, rank, options.elements) for source in ranks]).to(device)
    _shared.check("sizes", sizes, torch.tensor([share(source, rank, options.elements) for source in ranks]).to(device))
    _shared.check("elements", received.flatten(), expected)
    _shared.check("elements of the second tensor", negated.flatten(), -expected)

    table = net.simple_all_gather(sizes).view(len(ranks), len(ranks)).tolist()
    for target, row in zip(ranks, table, strict=True):
        session.dist_print(f"rank {target} received {row} elements from ranks 0 to {len(ranks) - 1}")
    time = system.perform(lambda: net.batch_all_to_all_v([data, -data], parts), options.num_loops)
    session.dist_print(f"[Summary] all elements are right; average time of a call = {time} sec.")


if __name__ == "__main__":
    main()
