"""What a file of states contains."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from tutel.checkpoint import files
from tutel.checkpoint.errors import CheckpointError
from tutel.checkpoint.keys import Layer, find_layers, layer_of, numbered


@dataclasses.dataclass(frozen=True)
class TensorSummary:
    """One tensor.

    Attributes:
        name: Its key.
        shape: Its sizes.
        dtype: Such as 'float32'.
        nbytes: Its size in bytes.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int


@dataclasses.dataclass(frozen=True)
class LayerSummary:
    """One Mixture-of-Experts layer.

    Attributes:
        name: Of the layer in its model; empty if the layer is the model.
        num_global_experts: E.
        num_experts: How many experts the file has, or has a part of; None if its tensors do not tell.
        experts: Their tensors.
        nbytes: Size of these in bytes.
    """

    name: str
    num_global_experts: int
    num_experts: int | None
    experts: tuple[TensorSummary, ...]
    nbytes: int


@dataclasses.dataclass(frozen=True)
class FileSummary:
    """A file.

    Attributes:
        path: Its name.
        kind: 'torch' or 'safetensors'.
        layers: The Mixture-of-Experts layers.
        shared: All other tensors.
        others: Keys of what is no tensor.
        nbytes: Size of all tensors in bytes.
    """

    path: str
    kind: str
    layers: tuple[LayerSummary, ...]
    shared: tuple[TensorSummary, ...]
    others: tuple[str, ...]
    nbytes: int

    def text(self) -> str:
        """Write it for people."""
        lines = [f"{self.path}: {self.kind}, {_bytes(self.nbytes)}"]
        for layer in self.layers:
            held = (
                "" if layer.num_experts in (None, layer.num_global_experts) else f", {layer.num_experts} of them here"
            )
            name = layer.name or "(the model)"
            lines.append(f"layer {name}: {layer.num_global_experts} experts{held}, {_bytes(layer.nbytes)}")
            lines += _table(layer.experts)
        if self.shared:
            lines += [f"shared: {_bytes(sum(tensor.nbytes for tensor in self.shared))}", *_table(self.shared)]
        if self.others:
            lines.append(f"no tensors: {', '.join(self.others)}")
        return "\n".join(lines)


def inspect_file(
    path: str | Path,
    *,
    namespace: str = "",
    default_num_global_experts: int | None = None,
    check: bool = False,
) -> FileSummary:
    """Tell what a file contains, without reading its tensors.

    Args:
        path: A safetensors file if its name ends so, PyTorch's otherwise.
        namespace: The entry of PyTorch's file that holds the state, 'a/b' for one inside another.
        default_num_global_experts: E of layers whose state does not tell; without it those are not seen.
        check: Compare the checksums of PyTorch's file, which reads all of it.

    Raises:
        ImportError: If it is a safetensors file and the package is not installed.
        CheckpointError: If the file is missing or damaged.
    """
    path = Path(path)
    root = files.read(path, check=check)
    state = files.entry(root, files.steps(path, namespace), str(path))
    try:
        layers = find_layers(state, default_num_global_experts)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    tensors = {key: _summary(key, value) for key, value in state.items() if isinstance(value, Tensor)}
    owners = {key: layer_of(key, layers) for key in tensors}
    return FileSummary(
        path=str(path),
        kind="safetensors" if path.suffix == files.SAFETENSORS else "torch",
        layers=tuple(_layer(layer, [tensors[key] for key in tensors if owners[key] == layer]) for layer in layers),
        shared=tuple(tensor for key, tensor in tensors.items() if owners[key] is None),
        others=tuple(key for key in state if key not in tensors),
        nbytes=sum(tensor.nbytes for tensor in tensors.values()),
    )


def _summary(key: str, value: Tensor) -> TensorSummary:
    return TensorSummary(key, tuple(value.shape), str(value.dtype).removeprefix("torch."), value.nbytes)


def _layer(layer: Layer, tensors: list[TensorSummary]) -> LayerSummary:
    names = [tensor.name[len(layer.experts) :] for tensor in tensors]
    numbers = {None if (found := numbered(name)) is None else found[0] for name in names}
    first = {tensor.shape[0] for tensor in tensors if len(tensor.shape) > 1}
    count = len(numbers) if None not in numbers else first.pop() if len(first) == 1 else None
    return LayerSummary(
        layer.prefix.removesuffix("."),
        layer.num_experts,
        count if tensors else 0,
        tuple(tensors),
        sum(tensor.nbytes for tensor in tensors),
    )


def _table(tensors: Iterable[TensorSummary]) -> list[str]:
    rows = [(tensor.name, str(list(tensor.shape)), tensor.dtype, _bytes(tensor.nbytes)) for tensor in tensors]
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(3)]
    return [f"  {row[0]:{widths[0]}}  {row[1]:{widths[1]}}  {row[2]:{widths[2]}}  {row[3]}" for row in rows]


def _bytes(count: int) -> str:
    size, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size /= 1024
        units.pop(0)
    return f"{count} B" if units[0] == "B" else f"{size:.1f} {units[0]}"
