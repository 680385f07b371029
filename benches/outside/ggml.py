"""The C interface of ggml, as far as a sparse block needs it, from the libraries that llama-cpp-python brings along."""

import ctypes
import importlib.util
from ctypes import POINTER, Structure, c_bool, c_int, c_int64, c_size_t, c_uint8, c_void_p
from pathlib import Path
from typing import Any

F32, BF16 = 0, 30


class _InitParameters(Structure):
    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


class _Plan(Structure):
    _fields_ = [
        ("work_size", c_size_t),
        ("work_data", POINTER(c_uint8)),
        ("n_threads", c_int),
        ("threadpool", c_void_p),
        ("abort_callback", c_void_p),
        ("abort_callback_data", c_void_p),
        ("use_ref", c_bool),
    ]


class _PoolParameters(Structure):
    _fields_ = [
        ("cpumask", c_bool * 512),
        ("n_threads", c_int),
        ("prio", c_int),
        ("poll", ctypes.c_uint32),
        ("strict_cpu", c_bool),
        ("paused", c_bool),
    ]


#: Functions whose arguments are not all pointers; everything else takes pointers and returns one.
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "ggml_init": (c_void_p, [_InitParameters]),
    "ggml_free": (None, [c_void_p]),
    "ggml_new_tensor_2d": (c_void_p, [c_void_p, c_int, c_int64, c_int64]),
    "ggml_new_tensor_3d": (c_void_p, [c_void_p, c_int, c_int64, c_int64, c_int64]),
    "ggml_reshape_2d": (c_void_p, [c_void_p, c_void_p, c_int64, c_int64]),
    "ggml_reshape_3d": (c_void_p, [c_void_p, c_void_p, c_int64, c_int64, c_int64]),
    "ggml_view_2d": (c_void_p, [c_void_p, c_void_p, c_int64, c_int64, c_size_t, c_size_t]),
    "ggml_argsort_top_k": (c_void_p, [c_void_p, c_void_p, c_int]),
    "ggml_mul_mat_id": (c_void_p, [c_void_p] * 4),
    "ggml_build_forward_expand": (None, [c_void_p] * 2),
    "ggml_new_graph": (c_void_p, [c_void_p]),
    "ggml_get_data": (c_void_p, [c_void_p]),
    "ggml_threadpool_params_init": (None, [POINTER(_PoolParameters), c_int]),
    "ggml_threadpool_new": (c_void_p, [POINTER(_PoolParameters)]),
    "ggml_graph_plan": (_Plan, [c_void_p, c_int, c_void_p]),
    "ggml_graph_compute": (c_int, [c_void_p, POINTER(_Plan)]),
    **{f"ggml_{name}": (c_void_p, [c_void_p] * 3) for name in ("add", "div", "get_rows", "mul", "mul_mat")},
    **{f"ggml_{name}": (c_void_p, [c_void_p] * 2) for name in ("soft_max", "sum_rows")},
    "ggml_swiglu_split": (c_void_p, [c_void_p] * 3),
}


class Ggml:
    """The functions, by their names without ``ggml_``."""

    def __init__(self) -> None:
        found = importlib.util.find_spec("llama_cpp")
        if found is None or found.origin is None:
            raise ModuleNotFoundError("llama-cpp-python is not installed")
        folder = Path(found.origin).parent / "lib"
        self._libraries = [
            ctypes.CDLL(str(folder / f"libggml-{part}.so"), ctypes.RTLD_GLOBAL) for part in ("base", "cpu")
        ]
        for name, (result, arguments) in _SIGNATURES.items():
            function = self._function(name)
            function.restype, function.argtypes = result, arguments
        self._libraries[1].ggml_cpu_init()

    def _function(self, name: str) -> Any:
        for library in self._libraries:
            if hasattr(library, name):
                return getattr(library, name)
        raise AttributeError(f"this ggml has no {name}")

    def __getattr__(self, name: str) -> Any:
        return self._function(f"ggml_{name}")

    def context(self, size: int) -> int:
        """Make a pool of so many bytes for tensors and their data."""
        made: int | None = self.init(_InitParameters(size, None, False))
        if made is None:
            raise MemoryError(f"ggml has no {size} bytes")
        return made

    def runner(self, graph: int, threads: int) -> Any:
        """Return a function that computes a graph with threads that stay, as llama.cpp's do."""
        settings = _PoolParameters()
        self.threadpool_params_init(ctypes.byref(settings), threads)
        plan = self.graph_plan(graph, threads, self.threadpool_new(ctypes.byref(settings)))
        work = (c_uint8 * max(1, plan.work_size))()
        plan.work_data = ctypes.cast(work, POINTER(c_uint8))

        def run() -> None:
            # Named here, so that it lives as long as the function.
            assert work is not None
            status = self.graph_compute(graph, ctypes.byref(plan))
            if status != 0:
                raise RuntimeError(f"ggml_graph_compute gives {status}")

        return run
