"""Files of W ranks into one file that holds all experts, and back."""

import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tutel.checkpoint import files
from tutel.checkpoint.errors import CheckpointError, names, refuse
from tutel.checkpoint.gathering import check_allow_different, gather_states
from tutel.checkpoint.same import same
from tutel.checkpoint.scattering import scatter_state
from tutel.errors import check_int
from tutel.system import apply_rank_size_from_pattern


def gather_files(
    inputs: str,
    input_size: int,
    output: str | Path,
    *,
    namespace: str = "",
    allow_different: str | None = None,
    check: bool = True,
    **options: Any,
) -> None:
    """Put the files of all ranks together in one.

    Args:
        inputs: Their names, with ``{rank}``, and ``{size}`` if they have it.
        input_size: How many there are.
        output: The file to write. Kinds of files are told by names: ``.safetensors``, or PyTorch's.
        namespace: The entry of PyTorch's files that holds the state, 'a/b' for one inside another; other entries are
            shared values.
        allow_different: 'first' or 'drop' for shared values that are not the same on all ranks.
        check: Compare checksums first.
        **options: Those of :func:`gather_states`.

    Raises:
        ImportError: If a safetensors file is named and the package is not installed.
        ValueError: If an argument is out of range.
        CheckpointError: If the set is damaged or incomplete; nothing is written then.
        OSError: If the output cannot be written.
    """
    paths = rank_paths("inputs", inputs, input_size)
    titles = [f"rank {rank} ({path})" for rank, path in enumerate(paths)]
    allowed = check_allow_different(allow_different)
    roots, states, problems = [], [], []
    for path, title in zip(paths, titles, strict=True):
        try:
            roots.append(files.read(path, check=check))
            states.append(files.entry(roots[-1], files.steps(path, namespace), str(path)))
        except CheckpointError as error:
            problems.append(f"{title.split(' (')[0]}: {error}")
    refuse("the set is damaged or incomplete", problems)
    with _bar("gather", sum(path.stat().st_size for path in paths), unit="B") as bar:
        state = gather_states(states, allow_different=allowed, titles=titles, progress=bar.update, **options)
        rest = _common_entries(roots, files.steps(paths[0], namespace), allowed, titles[0])
        with files.Outputs() as outputs:
            outputs.add(Path(output), _content(Path(output), rest, namespace, state))


def scatter_file(
    input: str | Path,  # noqa: A002  (the name of the command's option)
    output_size: int,
    outputs: str,
    *,
    namespace: str = "",
    check: bool = True,
    **options: Any,
) -> None:
    """Divide a file that holds all experts into those of several ranks.

    Args:
        input: The file. Kinds of files are told by names: ``.safetensors``, or PyTorch's.
        output_size: How many ranks.
        outputs: Names of the files to write, with ``{rank}``, and ``{size}`` if they have it.
        namespace: The entry of PyTorch's files that holds the state, 'a/b' for one inside another.
        check: Compare the checksum first.
        **options: Those of :func:`scatter_state`.

    Raises:
        ImportError: If a safetensors file is named and the package is not installed.
        ValueError: If an argument is out of range.
        CheckpointError: If the file is damaged or cannot be divided so; nothing is written then.
        OSError: If a file cannot be written.
    """
    paths = rank_paths("outputs", outputs, output_size)
    source = Path(input)
    root = files.read(source, check=check)
    path_in = files.steps(source, namespace)
    state = files.entry(root, path_in, str(source))
    rest = root if path_in else {}
    with _bar("scatter", len(paths), unit="file") as bar, files.Outputs() as written:
        for rank, path in enumerate(paths):
            written.add(path, _content(path, rest, namespace, scatter_state(state, len(paths), rank, **options)))
            bar.update(1)


def rank_paths(option: str, pattern: str, size: int) -> list[Path]:
    """Return the names of all ranks' files.

    Raises:
        TypeError: If size is no integer.
        ValueError: If several ranks would have the same file.
    """
    size = check_int(f"{option[:-1]}_size", size, at_least=1)
    if size > 1 and "{rank}" not in pattern:
        raise ValueError(f"{option} must contain {{rank}} for {size} ranks, got {pattern!r}")
    return [Path(apply_rank_size_from_pattern(pattern, rank, size, create_dir=False)) for rank in range(size)]


def _content(path: Path, rest: Mapping[str, Any], namespace: str, state: Mapping[str, Any]) -> Mapping[str, Any]:
    steps = files.steps(path, namespace)
    others = [str(key) for key in rest if key not in namespace.split("/")]
    if others and not steps:
        warnings.warn(f"{path} holds the state only: {names(others)} left out", UserWarning, stacklevel=3)
    return files.with_entry(rest, steps, state)


def _common_entries(
    roots: Sequence[Mapping[str, Any]], steps: Sequence[str], allowed: str | None, title: str
) -> dict[str, Any]:
    """Return what files hold beside their states, which has to be the same in all of them."""
    if not steps:
        return {}
    common: dict[str, Any] = {}
    different = []
    for key in dict.fromkeys(key for root in roots for key in root):
        values = [root.get(key) for root in roots]
        if key == steps[0]:
            common[key] = _common_entries([root[key] for root in roots], steps[1:], allowed, title)
        elif allowed == "first" or all(same(values[0], value) for value in values[1:]):
            common[key] = values[0]
        elif allowed is None:
            different.append(str(key))
    if different:
        raise CheckpointError(
            f"entries beside the state are not the same on all ranks: {names(different)} (allow_different='first' "
            f"takes those of {title}, 'drop' leaves them out)"
        )
    return common


def _bar(what: str, total: int, *, unit: str) -> "tqdm[Any]":
    """Show progress on a terminal, if it takes seconds."""
    return tqdm(
        desc=what, total=total, unit=unit, unit_scale=unit == "B", delay=1, leave=False, disable=not sys.stderr.isatty()
    )
