"""Weights of ``llama_ffn`` experts that are flat, as older versions stored them.

A rank's tensor had one dimension: its experts' [e, D, H] in a row, or, with n ranks that share one expert, one of n
pieces of ceil(D * H / n) elements, the last ones filled up.
"""

from torch import Tensor

#: Whether a weight of one expert is [D, H], or else [H, D].
_MODEL_DIM_FIRST = {"W_fc1": True, "W_fc2": True, "W_fc3": False}


def is_flat(name: str, value: Tensor) -> bool:
    """Tell whether an expert tensor is such a weight."""
    return name in _MODEL_DIM_FIRST and value.dim() == 1


def unflatten(name: str, value: Tensor, num_experts: int, model_dim: int | None, *, pieces: int = 1) -> Tensor:
    """Return flat weights in today's shape.

    Args:
        name: The parameter's name.
        value: Of num_experts experts, which may end with what pieces were filled up with.
        num_experts: How many experts.
        model_dim: D; None if it is not known.
        pieces: n, of which the tensor was put together.

    Returns:
        [e, D, H] or [e, H, D]; [e, D * H] where D is not known and not needed.

    Raises:
        ValueError: If D is needed and not known, or does not fit.
    """
    size = value.numel()
    if model_dim is None:
        if pieces > 1:
            raise ValueError("a flat weight in several pieces needs model_dim to tell where it ends")
        return value.reshape(num_experts, -1)
    whole = num_experts * model_dim
    # ceil(x / n) * n is size for these x only.
    sizes = [x for x in range(size - pieces + 1, size + 1) if x > 0 and x % whole == 0]
    if len(sizes) != 1:
        raise ValueError(
            f"a flat weight of {size} elements is none of {num_experts} experts with model_dim {model_dim}"
        )
    first, last = (model_dim, -1) if _MODEL_DIM_FIRST[name] else (-1, model_dim)
    return value[: sizes[0]].reshape(num_experts, first, last)
