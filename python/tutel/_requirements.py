"""What must be installed before the operators can be registered."""

OLDEST_TORCH = (2, 10)


def require_torch() -> None:
    """Say in one sentence what is missing, if torch is missing or too old.

    Raises:
        ImportError: If torch cannot be imported or is older than :data:`OLDEST_TORCH`.
    """
    oldest = ".".join(map(str, OLDEST_TORCH))
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise  # torch is there, but something that torch needs is not: that is the better message
        raise ImportError(
            f"tutel needs PyTorch {oldest} or newer, which is not installed (pip install 'torch>={oldest}')"
        ) from None
    major, minor = torch.__version__.split(".")[:2]
    if (int(major), int(minor)) < OLDEST_TORCH:
        raise ImportError(f"tutel needs PyTorch {oldest} or newer, found {torch.__version__}")
