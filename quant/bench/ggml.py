"""llama.cpp's own products, for comparison: its ggml libraries, as the package llama-cpp-python has them.

Weights lie as files have them, or rearranged for the processor, as llama.cpp does where it can.
"""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path

import torch

# `enum ggml_type` of ggml.h
TYPES = {
    "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "q2_k": 10, "q3_k": 11, "q4_k": 12, "q5_k": 13,
    "q6_k": 14, "iq4_nl": 20, "iq4_xs": 23, "mxfp4": 39,
}  # fmt: skip
_F32 = 0
Pointer, Int64, Size = ctypes.c_void_p, ctypes.c_int64, ctypes.c_size_t


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", Size), ("mem_buffer", Pointer), ("no_alloc", ctypes.c_bool))


_BASE: dict[str, tuple[object, list[object]]] = {
    "ggml_log_set": (None, [Pointer, Pointer]),
    "ggml_init": (Pointer, [_InitParams]),
    "ggml_free": (None, [Pointer]),
    "ggml_new_tensor_2d": (Pointer, [Pointer, ctypes.c_int, Int64, Int64]),
    "ggml_mul_mat": (Pointer, [Pointer, Pointer, Pointer]),
    "ggml_new_graph": (Pointer, [Pointer]),
    "ggml_build_forward_expand": (None, [Pointer, Pointer]),
    "ggml_nbytes": (Size, [Pointer]),
    "ggml_quantize_chunk": (Size, [ctypes.c_int, Pointer, Pointer, Int64, Int64, Int64, Pointer]),
    "ggml_backend_alloc_ctx_tensors": (Pointer, [Pointer, Pointer]),
    "ggml_backend_alloc_ctx_tensors_from_buft": (Pointer, [Pointer, Pointer]),
    "ggml_backend_tensor_set": (None, [Pointer, Pointer, Size, Size]),
    "ggml_backend_graph_compute": (ctypes.c_int, [Pointer, Pointer]),
    "ggml_backend_reg_get_proc_address": (Pointer, [Pointer, ctypes.c_char_p]),
    "ggml_backend_reg_dev_get": (Pointer, [Pointer, Size]),
    "ggml_backend_dev_supports_op": (ctypes.c_bool, [Pointer, Pointer]),
    "ggml_backend_buffer_free": (None, [Pointer]),
    "ggml_backend_free": (None, [Pointer]),
}
_CPU: dict[str, tuple[object, list[object]]] = {
    "ggml_backend_cpu_init": (Pointer, []),
    "ggml_backend_cpu_reg": (Pointer, []),
    "ggml_backend_cpu_set_n_threads": (None, [Pointer, ctypes.c_int]),
}


# ggml reports every tensor that it rearranges.
_be_quiet = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, Pointer)(lambda _level, _text, _data: None)


class GgmlMissingError(Exception):
    """llama-cpp-python is not installed, or its libraries are not as expected; the message says which."""


def _load(path: Path, signatures: dict[str, tuple[object, list[object]]]) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        for name, (result, arguments) in signatures.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise GgmlMissingError(f"unsupported version of llama-cpp-python: {error}") from error
    return library


class GgmlProducts:
    """`count` copies of a random matrix `[rows, cols]` in a ggml type, and their products with a vector.

    rearranged: lay the weights out as llama.cpp does where it can.
    Raises GgmlMissingError where the libraries are not there, or cannot rearrange this type.
    """

    def __init__(self, type_: str, rows: int, cols: int, count: int, rearranged: bool) -> None:
        spec = importlib.util.find_spec("llama_cpp")
        if spec is None or not spec.submodule_search_locations:
            raise GgmlMissingError("llama-cpp-python is not installed; install Loci with the extra `ggml`")
        folder = Path(next(iter(spec.submodule_search_locations))) / "lib"
        self._base = _load(folder / "libggml-base.so", _BASE)
        self._cpu = _load(folder / "libggml-cpu.so", _CPU)
        self._base.ggml_log_set(ctypes.cast(_be_quiet, Pointer), None)
        self._backend = self._cpu.ggml_backend_cpu_init()
        self._cpu.ggml_backend_cpu_set_n_threads(self._backend, torch.get_num_threads())
        self._contexts: list[int] = []
        self._buffers: list[int] = []
        self.nbytes = 0  # of one matrix

        weights = self._context(count)
        self._weights = [
            self._base.ggml_new_tensor_2d(weights, TYPES[type_], cols, rows) for _ in range(count)
        ]
        self._operands = self._context(2 * count)
        self._x = self._base.ggml_new_tensor_2d(self._operands, _F32, cols, 1)
        self._products = [
            self._base.ggml_mul_mat(self._operands, weight, self._x) for weight in self._weights
        ]
        if rearranged:
            self._buffers.append(self._rearranging_buffer(weights, type_))
        else:
            self._buffers.append(self._base.ggml_backend_alloc_ctx_tensors(weights, self._backend))
        self._buffers.append(self._base.ggml_backend_alloc_ctx_tensors(self._operands, self._backend))
        self._fill(TYPES[type_], rows, cols)

    def graphs(self, each: int) -> list[int]:
        """Graphs of `each` products, of different matrices, for `compute`."""
        graphs = []
        for first in range(0, len(self._products) // each * each, each):
            context = self._context(each)
            graph = self._base.ggml_new_graph(context)
            for product in self._products[first : first + each]:
                self._base.ggml_build_forward_expand(graph, product)
            graphs.append(graph)
        return graphs

    def compute(self, graph: int) -> None:
        """Run a graph on as many threads as torch has."""
        status = self._base.ggml_backend_graph_compute(self._backend, graph)
        if status != 0:
            raise GgmlMissingError(f"ggml refused the multiplication (status {status})")

    def close(self) -> None:
        """Give the memory back."""
        for buffer in self._buffers:
            self._base.ggml_backend_buffer_free(buffer)
        for context in self._contexts:
            self._base.ggml_free(context)
        self._base.ggml_backend_free(self._backend)

    def _context(self, tensors: int) -> int:
        # Room for the structs of tensors and a graph (of 2048 nodes at most); their data lie in buffers.
        context: int = self._base.ggml_init(_InitParams((1 << 20) + 1024 * tensors, None, True))
        self._contexts.append(context)
        return context

    def _rearranging_buffer(self, weights: int, type_: str) -> int:
        """A buffer of the first of the processor's special types that multiplies such weights."""
        register = self._cpu.ggml_backend_cpu_reg()
        device = self._base.ggml_backend_reg_dev_get(register, 0)
        address = self._base.ggml_backend_reg_get_proc_address(register, b"ggml_backend_dev_get_extra_bufts")
        types = ctypes.CFUNCTYPE(ctypes.POINTER(Pointer), Pointer)(address)(device) if address else [None]
        for place in range(8):
            if not types[place]:
                break
            buffer: int | None = self._base.ggml_backend_alloc_ctx_tensors_from_buft(weights, types[place])
            if buffer is None:
                continue
            if self._base.ggml_backend_dev_supports_op(device, self._products[0]):
                return buffer
            self._base.ggml_backend_buffer_free(buffer)
        raise GgmlMissingError(f"llama.cpp does not repack {type_} on this processor")

    def _fill(self, type_: int, rows: int, cols: int) -> None:
        values, x = torch.randn(rows, cols), torch.randn(cols)
        self.nbytes = self._base.ggml_nbytes(self._weights[0])
        packed = torch.empty(self.nbytes, dtype=torch.uint8)
        self._base.ggml_quantize_chunk(type_, values.data_ptr(), packed.data_ptr(), 0, rows, cols, None)
        for weight in self._weights:
            self._base.ggml_backend_tensor_set(weight, packed.data_ptr(), 0, self.nbytes)
        self._base.ggml_backend_tensor_set(self._x, x.data_ptr(), 0, x.nbytes)
