"""The compiled kernels: locates the shared library and declares its functions.

The library is an extension module in name only: setuptools builds it with the package, ctypes calls it
(releasing the GIL). If it was not built, `load` says so.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
from functools import cache
from pathlib import Path

LEVELS = ("portable", "avx2", "avx512")
INTERFACE = 24  # of native_src/api.cpp; another number means a library built from different sources

Pointer = ctypes.c_void_p
Int = ctypes.c_int
Int64 = ctypes.c_int64

SIGNATURES: dict[str, tuple[object, list[object]]] = {
    "loci_interface": (Int, []),
    "loci_level_name": (ctypes.c_char_p, [Int]),
    "loci_has_bf16": (Int, [Int]),
    "loci_panel_bytes": (Int64, [Pointer]),
    "loci_tile": (None, [Int, Pointer, Pointer]),
    "loci_untile": (None, [Int, Pointer, Pointer, Int64, Pointer, Pointer]),
    "loci_linear": (None, [Int, Int, Int, Pointer, Pointer, Int64, Pointer]),
    "loci_linear_blocks": (None, [Int, Int, Int, Pointer, Int64, Pointer, Int64, Pointer]),
    "loci_dense_linear": (None, [Int, Int, Int, Pointer, Int, Int64, Int64, Pointer, Int64, Pointer]),
    "loci_dense_blocks": (
        None,
        [Int, Int, Int, Pointer, Int, Int64, Int64, Int64, Pointer, Int64, Pointer],
    ),
    "loci_moe": (Int, [Int, Int, Int, Pointer, Pointer, Pointer]),
    "loci_gather_rows": (None, [Int, Int, Pointer, Pointer, Int, Int64, Pointer, Int64, Pointer]),
    "loci_rms_norm": (None, [Int, Int, Pointer, Pointer, Int64, Int64, ctypes.c_float, Pointer]),
    "loci_run_program": (Int64, [Int, Int, Int, Pointer, Int64, Int64, Pointer]),
    "loci_sinkhorn": (None, [Pointer, Int64, Int64, Int64, ctypes.c_float]),
    "loci_turns": (None, [Pointer, Pointer, Int64, Int64, Pointer]),
    "loci_attend": (None, [Int, Int, Pointer, Pointer]),
    "loci_encode_rows": (None, [Int, Int, Pointer, Pointer, Int64, Pointer]),
    "loci_index_scores": (None, [Int, Int, Pointer, Pointer]),
    "loci_best_columns": (None, [Int, Pointer, Int64, Int64, Int64, Pointer]),
    "loci_route": (None, [Int, Pointer, Pointer, Int64, Int64, Pointer, Pointer, Pointer]),
    "loci_weigh": (None, [Int, Pointer, Pointer, Int64, Int64, Pointer, Pointer]),
    "loci_weighted_sum": (None, [Int, Int, Pointer, Pointer, Int64, Int64, Int64, Pointer]),
    "loci_mix_streams": (None, [Int, Int, Pointer, Pointer, Pointer, Pointer, Int64, Int64, Int64, Pointer]),
    "loci_sigmoid": (None, [Int, Int, Pointer, Int64, Pointer]),
    "loci_gated": (
        None,
        [Int, Int, Pointer, Pointer, ctypes.c_float, ctypes.c_float, ctypes.c_float, Int64, Pointer],
    ),
    "loci_rotate": (None, [Int, Int, Pointer, Pointer, Int64, Int64, Int64, Int64, Pointer]),
    "loci_pool_groups": (None, [Int, Int, Pointer, Pointer, Int64, Int64, Int64, Pointer]),
    "loci_engram_gates": (
        None,
        [Int, Int, Pointer, Pointer, Pointer, Int64, Int64, Int64, Int64, ctypes.c_float, Pointer],
    ),
    "loci_convolve": (None, [Int, Int, Pointer, Pointer]),
    "loci_delta_rule": (None, [Int, Int, Pointer, Pointer]),
    "loci_draw": (None, [Int, Int, Pointer, Int64, Pointer, Int64, Pointer]),
    "loci_log_probabilities": (None, [Int, Int, Pointer, Int64, Int64, Int64, Pointer, Pointer]),
    "loci_mask": (None, [Int, Pointer, Int64, Pointer, Int64, Pointer]),
    "loci_rows_open": (Pointer, [Int, Int]),
    "loci_rows_add": (Int64, [Pointer, Pointer]),
    "loci_rows_ask": (Pointer, [Pointer, Int64, Pointer, Int64, Pointer]),
    "loci_rows_done": (Int, [Pointer]),
    "loci_rows_wait": (Int, [Pointer, Pointer]),
    "loci_rows_forget": (None, [Pointer]),
    "loci_rows_close": (None, [Pointer]),
    "loci_read": (ctypes.c_uint64, [Int, Int, Pointer, Int64, Int64]),
    "loci_read_rows": (ctypes.c_uint64, [Int, Int, Pointer, Int64, Pointer, Int64]),
}


class LibraryMissingError(Exception):
    """The package was installed without its compiled part; the message says what to do."""


def library_path() -> Path | None:
    """Path of the package's compiled kernels, or None if they were not built."""
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_native{suffix}")
        if path.exists():
            return path
    return None


@cache
def load() -> ctypes.CDLL:
    """The library with its signatures set. Raises LibraryMissingError if it is missing or cannot be
    loaded."""
    path = library_path()
    if path is None:
        raise LibraryMissingError(
            "the compiled kernels were not built; install a C++ compiler (g++ or clang++) and install again"
        )
    try:
        library = ctypes.CDLL(str(path))
        for name, (result, arguments) in SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
        if library.loci_interface() != INTERFACE:
            raise OSError("built from different sources")
    except (OSError, AttributeError) as error:
        raise LibraryMissingError(
            f"the compiled kernels cannot be loaded ({error}); reinstall the package"
        ) from error
    return library


def available_levels() -> tuple[str, ...]:
    """The instruction-set levels that this machine supports, slowest first."""
    library = load()
    return tuple(name for index, name in enumerate(LEVELS) if library.loci_level_name(index) is not None)
