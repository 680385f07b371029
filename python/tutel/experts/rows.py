"""What travels between dispatch, experts and combine."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Rows of tokens, expert by expert, without gaps.

    Attributes:
        data: [R, D].
        offsets: [E + 1] int64: expert e owns rows ``offsets[e]`` up to ``offsets[e + 1]``; rows behind are zero.
    """

    data: Tensor
    offsets: Tensor


@dataclass(frozen=True)
class PaddedRows:
    """Rows of tokens, equally many an expert, for experts that ask for that.

    Attributes:
        data: [E, C, D]; zero where a slot is empty.
    """

    data: Tensor
