"""One module of the user's an expert, called on that expert's rows [rows, D]."""

import torch
from torch import Tensor, nn

from tutel.experts.own import OwnExperts
from tutel.experts.precision import as_parameters
from tutel.experts.rows import Rows


class ModuleExperts(OwnExperts, nn.ModuleList):
    """The local experts in order.

    The numbers of rows are read on the host, once a forward: a module sees exactly its rows, perhaps none.
    """

    padded = False

    @property
    def num_local_experts(self) -> int:
        """Experts of this rank."""
        return len(self)

    def weights(self) -> None:
        """Modules use their parameters themselves."""

    def compute(self, rows: Rows, weights: None) -> Rows:  # noqa: ARG002  (one signature for all experts)
        """Compute each expert's rows.

        Raises:
            ValueError: If a module does not return [rows, D_out], D_out the same for all.
        """
        bounds = rows.offsets.tolist()
        outputs: list[Tensor] = []
        for expert, module in enumerate(self):
            owned = rows.data[bounds[expert] : bounds[expert + 1]]
            output = module(as_parameters(owned, module))
            self._check(expert, output, len(owned), outputs[0] if outputs else None)
            outputs.append(output.to(rows.data.dtype))
        unused = outputs[0].new_zeros((rows.data.shape[0] - bounds[-1], outputs[0].shape[1]))
        return Rows(torch.cat([*outputs, unused]), rows.offsets)

    @staticmethod
    def _check(expert: int, output: object, rows: int, first: Tensor | None) -> None:
        width = "D_out" if first is None else first.shape[1]
        fits = isinstance(output, Tensor) and output.dim() == 2 and output.shape[0] == rows
        if not fits or (first is not None and output.shape[1] != width):  # type: ignore[attr-defined]
            found = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(f"experts[{expert}] must return shape [{rows}, {width}], got {found}")
