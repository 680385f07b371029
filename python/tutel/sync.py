"""What the ranks of a layer must agree on, apart from tokens: a largest number of tokens, sums of counts."""

from typing import Protocol


class Sync(Protocol):
    """Agreement between the ranks of a layer's group."""

    def max(self, value: int) -> int:
        """Return the largest of the ranks' values."""
        ...


class LocalSync:
    """The only rank agrees with itself."""

    def max(self, value: int) -> int:
        """Return the value."""
        return value
