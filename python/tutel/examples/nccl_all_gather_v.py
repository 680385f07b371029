"""Join tensors whose sizes differ between the ranks: ``python3 -m tutel.examples.nccl_all_gather_v``.

Each rank gives another number of elements, of two tensors in one call, and checks that it receives those of all ranks.
NCCL on GPUs, Gloo on CPUs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tutel import net, system
from tutel.examples import _shared


def content(rank: int, elements: int) -> Tensor:
    """Return what a rank gives: numbers that tell where they come from; rank 1 gives nothing."""
    count = elements * ((rank + 2) % 3) // 2
    return torch.arange(count, dtype=torch.float64) + 1e9 * rank


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program; a wrong element is an error."""
    parser = _shared.bare_argument_parser(__doc__)
    parser.add_argument("--elements", type=int, default=1000, help="of the rank that gives most")
    parser.add_argument("--num_loops", type=int, default=20, help="calls that are measured")
    options = _shared.parse(parser, arguments)
    session, device = _shared.start(options)
    ranks = range(session.global_size)

    data = content(session.global_rank, options.elements).to(device)
    (received, negated), sizes = net.batch_all_gather_v([data, -data])

    contents = [content(rank, options.elements) for rank in ranks]
    _shared.check("sizes", sizes, torch.tensor([part.numel() for part in contents]).to(device))
    _shared.check("elements", received, torch.cat(contents).to(device))
    _shared.check("elements of the second tensor", negated, -torch.cat(contents).to(device))

    session.dist_print(f"each rank received {sizes.tolist()} elements from ranks 0 to {len(ranks) - 1}")
    time = system.perform(lambda: net.batch_all_gather_v([data, -data]), options.num_loops)
    session.dist_print(f"[Summary] all elements are right; average time of a call = {time} sec.")


if __name__ == "__main__":
    main()
