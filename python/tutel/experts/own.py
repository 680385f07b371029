"""What tells experts of this package from those of a user's class, which may have attributes of any name."""

from typing import TYPE_CHECKING, Any

from tutel.experts.shards import Gather

if TYPE_CHECKING:
    from tutel.experts.rows import Rows


class OwnExperts:
    """Experts that compute rows with weights which they are given.

    Attributes:
        padded: Whether they need equally many rows an expert.
    """

    padded: bool

    def weights(self) -> Any:
        """Return this rank's parameters in the form that computing takes; None where modules use their own."""
        raise NotImplementedError

    def gather_weights(self, parts: Gather, biases: Gather, count: int, *, leads: bool) -> Any:
        """Return the weights of whole experts, or of larger parts of them, from the ranks that have the parts.

        Args:
            parts: Joins what ranks have of the hidden units along dimension 0, expert by expert.
            biases: Likewise what ranks have of the outputs' biases, of whole experts.
            count: Parts that make one.
            leads: Whether this rank adds the outputs' biases: of the ranks that compute an expert together, one does.
        """
        raise NotImplementedError

    def compute(self, rows: "Rows", weights: Any) -> "Rows":
        """Compute each expert's rows."""
        raise NotImplementedError
