"""What is wrong with checkpoints."""

from collections.abc import Sequence

#: So many lines at most: a set of a thousand files that lack everything is told by its first few.
_LINES = 20


class CheckpointError(ValueError):
    """A checkpoint that is damaged, incomplete, or does not fit what was asked for; nothing was written."""


def refuse(what: str, problems: Sequence[str]) -> None:
    """Raise one error for all problems that were found.

    Raises:
        CheckpointError: If there are any.
    """
    if not problems:
        return
    if len(problems) == 1:
        raise CheckpointError(f"{what}: {problems[0]}")
    shown = [f"  {problem}" for problem in problems[:_LINES]]
    if len(problems) > _LINES:
        shown.append(f"  and {len(problems) - _LINES} more")
    raise CheckpointError("\n".join([f"{what}:", *shown]))


def names(keys: Sequence[str], limit: int = 8) -> str:
    """Write keys as a list, the first few of many."""
    listed = ", ".join(keys[:limit])
    return listed if len(keys) <= limit else f"{listed} and {len(keys) - limit} more"
