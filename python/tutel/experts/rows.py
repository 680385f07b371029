"""What travels between dispatch, experts and combine."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Rows of tokens, expert by expert.

    Attributes:
        data: [R, D].
        offsets: [E + 1] int64: expert e owns rows ``offsets[e]`` up to ``offsets[e + 1]``; rows behind are zero.
    """

    data: Tensor
    offsets: Tensor
