"""A sparse block as llama.cpp's graphs have it, computed by ggml, as a worker."""

import ctypes
from pathlib import Path

import numpy as np

from benches.outside.ggml import BF16, F32, Ggml
from benches.outside.protocol import Block, Job, serve

#: Room for the description of tensors and graph beside their data.
_SPARE = 16 * 2**20


class _Builder:
    """Makes the weights, then a graph on them."""

    def __init__(self, job: Job) -> None:
        self.job, self.ggml = job, Ggml()
        self.type, size = (BF16, 2) if job.dtype == "bf16" else (F32, 4)
        numbers = job.experts * (3 * job.hidden + 1) * job.width
        self.weights = self.ggml.context(numbers * size + _SPARE)
        rows = job.tokens * job.top_k
        values = 4 * job.tokens * (job.width * (job.top_k + 2) + 6 * job.experts) + 4 * rows * (
            3 * job.hidden + 2 * job.width
        )
        self.values = self.ggml.context(2 * values + _SPARE)

    def weight(self, path: Path, *shape: int) -> int:
        """Load a weight; the shape is ggml's, innermost first."""
        numbers = np.fromfile(path, dtype=np.float32)
        if self.type == BF16:
            # The numbers are exact in bf16: it is their upper half.
            numbers = (numbers.view(np.uint32) >> 16).astype(np.uint16)
        new = self.ggml.new_tensor_2d if len(shape) == 2 else self.ggml.new_tensor_3d
        tensor: int = new(self.weights, self.type, *shape)
        ctypes.memmove(self.ggml.get_data(tensor), numbers.ctypes.data, numbers.nbytes)
        return tensor

    def graph(self) -> tuple[int, int, int]:
        """Return the graph, its input and its output."""
        job, ggml, values = self.job, self.ggml, self.values
        experts, hidden, width, top_k, count = job.experts, job.hidden, job.width, job.top_k, job.tokens
        router = self.weight(job.path("router"), width, experts)
        gate, up = (self.weight(job.path(name), width, hidden, experts) for name in ("gate", "up"))
        down = self.weight(job.path("down"), hidden, width, experts)

        tokens: int = ggml.new_tensor_2d(values, F32, width, count)
        scores = ggml.soft_max(values, ggml.mul_mat(values, router, tokens))
        ids = ggml.argsort_top_k(values, scores, top_k)
        chosen = ggml.get_rows(values, ggml.reshape_3d(values, scores, 1, experts, count), ids)
        chosen = ggml.reshape_2d(values, chosen, top_k, count)
        weights = ggml.div(values, chosen, ggml.sum_rows(values, chosen))
        weights = ggml.reshape_3d(values, weights, 1, top_k, count)

        rows = ggml.reshape_3d(values, tokens, width, 1, count)
        gated, linear = (ggml.mul_mat_id(values, weight, rows, ids) for weight in (gate, up))
        results = ggml.mul_mat_id(values, down, ggml.swiglu_split(values, gated, linear), ids)
        results = ggml.mul(values, results, weights)
        row = width * ctypes.sizeof(ctypes.c_float)
        parts = [ggml.view_2d(values, results, width, count, top_k * row, choice * row) for choice in range(top_k)]
        output = parts[0]
        for part in parts[1:]:
            output = ggml.add(values, output, part)
        graph: int = ggml.new_graph(values)
        ggml.build_forward_expand(graph, output)
        return graph, tokens, output


def _prepare(job: Job) -> Block:
    builder = _Builder(job)
    graph, tokens, output = builder.graph()
    compute = builder.ggml.runner(graph, job.threads)
    inputs = np.fromfile(job.path("inputs"), dtype=np.float32).reshape(job.inputs, job.tokens, job.width)
    target, source = builder.ggml.get_data(tokens), builder.ggml.get_data(output)
    size = inputs[0].nbytes

    def run(index: int) -> None:
        ctypes.memmove(target, inputs[index].ctypes.data, size)
        compute()

    return run, lambda: ctypes.string_at(source, size)


if __name__ == "__main__":
    serve(_prepare)
