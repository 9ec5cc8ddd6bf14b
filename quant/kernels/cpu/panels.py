"""Weights in the native kernels' layout: panels of 32 rows, read strictly in sequence.

A tiled PackedTensor has the format `TILED[name]`. Its codes are one flat run of bytes, panel after panel,
each with 32 rows' codes and scales (bit by bit in `native_src/formats.hpp`): as many bytes as before, but for
rows that fill up the last panel. FP8 keeps its scales apart, as they were.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cached_property

import torch

from quant.errors import FormatError
from quant.formats.four_bit import FourBit
from quant.formats.fp8 import FP8_32, FP8_128, Fp8
from quant.formats.gguf_k import Q2_K, Q3_K, Q4_K, Q5_K, Q6_K
from quant.formats.gguf_legacy import Q4_0, Q4_1, Q5_0, Q5_1, Q8_0
from quant.formats.gguf_levels import IQ4_NL, IQ4_XS, MXFP4_BLOCKS
from quant.formats.int4 import INT4_GROUPS, INT4_HALF_GROUPS, INT4_OFFSET_FLOAT_GROUPS, INT4_OFFSET_GROUPS
from quant.formats.mxfp4 import MXFP4
from quant.formats.nf4 import NF4
from quant.formats.nvfp4 import NVFP4
from quant.formats.plain import BF16, F16, F32
from quant.kernels.cpu import library
from quant.kernels.interface import ExpertWeights
from quant.packed import Format, PackedTensor

PANEL_ROWS = 32
BLOCK = 32  # columns that share an activation scale
# Bytes that a block takes in a panel besides those in the file: scales of six bits have a byte there.
UNPACKED_BYTES = {Q3_K.name: 4, Q4_K.name: 4, Q5_K.name: 4, IQ4_XS.name: 2}


class Matrix(ctypes.Structure):
    """`Matrix` of native_src/kernels.hpp."""

    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("format", ctypes.c_int64),
        ("tiled", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("cols", ctypes.c_int64),
        ("tile_rows", ctypes.c_int64),
        ("tile_cols", ctypes.c_int64),
        ("float_scales", ctypes.c_int64),
    )


class Tiled(Format):
    """A format repacked into panels; `base` is the format in files."""

    def __init__(self, base: Format, number: int) -> None:
        self.base = base
        self.number = number  # `Format` of native_src/kernels.hpp
        self.keeps_scales = isinstance(base, Fp8)
        self.name = f"{base.name} in panels"
        self.tile_rows = max(PANEL_ROWS, base.tile_rows)
        self.tile_cols = base.tile_cols

    def holds(self, cols: int) -> bool:
        """Whether there are panels of so many columns: of FP8 any, of others whole blocks."""
        return self.keeps_scales or cols % max(BLOCK, self.base.tile_cols) == 0

    def row_bytes(self, cols: int) -> int:
        """Bytes of a row within its panel; 32 of them are a panel."""
        if isinstance(self.base, Fp8):
            return -(-cols // 2) * 2
        unpacked = cols // self.base.tile_cols * UNPACKED_BYTES.get(self.base.name, 0)
        return self.base.bytes_for(1, cols) + unpacked

    def code_bytes(self, cols: int) -> int:
        """Bytes of a row of codes in file layout."""
        if isinstance(self.base, Fp8):
            return cols
        return cols // 2 if isinstance(self.base, FourBit) else self.base.bytes_for(1, cols)

    def bytes_for(self, rows: int, cols: int) -> int:
        """Bytes of the panels (of FP8, without its scales)."""
        return -(-rows // PANEL_ROWS) * PANEL_ROWS * self.row_bytes(cols)

    def check(self, packed: PackedTensor) -> None:
        self.expect("codes shape", tuple(packed.codes.shape), (self.bytes_for(*packed.shape),))
        self.expect("codes dtype", packed.codes.dtype, torch.uint8)
        self.expect("codes in one run", packed.codes.is_contiguous(), True)
        self.expect("whole blocks of columns", self.holds(packed.shape[1]), True)

    def decode(self, packed: PackedTensor) -> torch.Tensor:
        return untile(packed).decode()

    def slice_rows(self, packed: PackedTensor, start: int, stop: int) -> PackedTensor:
        cols = packed.shape[1]
        first, last = self.bytes_for(start, cols), self.bytes_for(stop, cols)
        scales = packed.scales
        if scales is not None:
            scales = scales[start // self.base.tile_rows : -(-stop // self.base.tile_rows)]
        return NativeWeight(self, (stop - start, cols), packed.codes[first:last], scales)


_NUMBERS: tuple[tuple[Format, ...], ...] = (
    (MXFP4,),
    (FP8_32, FP8_128),
    (Q4_0,),
    (Q4_1,),
    (Q8_0,),
    (Q6_K,),
    (NF4,),
    tuple(INT4_GROUPS.values()),
    tuple(INT4_OFFSET_GROUPS.values()),
    (Q5_0,),
    (Q5_1,),
    (Q2_K,),
    (Q3_K,),
    (Q4_K,),
    (Q5_K,),
    (IQ4_NL,),
    (IQ4_XS,),
    (MXFP4_BLOCKS,),
    tuple(INT4_HALF_GROUPS.values()),
    tuple(INT4_OFFSET_FLOAT_GROUPS.values()),
    (NVFP4,),
)  # in the order of `Format` in native_src/kernels.hpp
TILED: dict[str, Tiled] = {
    base.name: Tiled(base, number) for number, bases in enumerate(_NUMBERS) for base in bases
}


def panel_bytes(nbytes: int, form: Format, rows: int, cols: int) -> int:
    """Bytes in memory of a matrix that takes `nbytes` in its file: panels are whole, and some formats' scales
    take more room in them."""
    whole = -(-rows // PANEL_ROWS) * PANEL_ROWS
    return nbytes * whole // rows + whole * cols // form.tile_cols * UNPACKED_BYTES.get(form.name, 0)


def tiled_format(packed: PackedTensor) -> Tiled | None:
    """The panel layout of a weight's format, whether or not it is tiled already; None if there is none."""
    if isinstance(packed.format, Tiled):
        return packed.format
    form = TILED.get(packed.format.name)
    return None if form is None or not form.holds(packed.shape[1]) else form


# Plain rows, which are multiplied as they lie; their numbers follow those of formats with panels.
PLAIN_NUMBERS: dict[str, int] = {
    plain.name: len(_NUMBERS) + place for place, plain in enumerate((BF16, F16, F32))
}


@dataclass(frozen=True)
class NativeWeight(PackedTensor):
    """A weight that the library can read: its codes and its scales are each contiguous."""

    @cached_property
    def matrix(self) -> Matrix:
        """The library's descriptor of it.

        Cached: making it again takes microseconds when the CPU caches are cold.
        """
        if self.format.name in PLAIN_NUMBERS:
            number = PLAIN_NUMBERS[self.format.name]
            return Matrix(self.codes.data_ptr(), 0, number, 1, *self.shape, 1, 1, 0)
        form = tiled_format(self)
        assert form is not None
        return Matrix(
            self.codes.data_ptr(),
            0 if self.scales is None else self.scales.data_ptr(),
            form.number,
            int(form is self.format),
            *self.shape,
            form.base.tile_rows,
            form.base.tile_cols,
            int(self.scales is not None and self.scales.dtype == torch.float32),
        )

    @cached_property
    def address(self) -> int:
        """The address of `matrix`."""
        return ctypes.addressof(self.matrix)


def native_weight(packed: PackedTensor) -> NativeWeight | None:
    """The weight for the library, copied if it is not contiguous; None if no kernel reads its format."""
    if isinstance(packed, NativeWeight):
        return packed
    if tiled_format(packed) is None and packed.format.name not in PLAIN_NUMBERS:
        return None
    scales = None if packed.scales is None else packed.scales.contiguous()
    return NativeWeight(packed.format, packed.shape, packed.codes.contiguous(), scales)


def matrix_addresses(expert: ExpertWeights) -> tuple[int, int, int]:
    """Addresses of the library's descriptors of w1, w3 and w2, which live as long as the expert's weights.

    Zeros for a format without panels.
    """
    natives = [weight if isinstance(weight, NativeWeight) else None for weight in expert.matrices]
    w1, w3, w2 = (0 if native is None else native.address for native in natives)
    return (w1, w3, w2) if w1 and w3 and w2 else (0, 0, 0)


def tile(packed: PackedTensor, out: torch.Tensor | None = None, threads: int | None = None) -> NativeWeight:
    """`packed` repacked into panels, in `out` (uint8, of `TILED[...].bytes_for` bytes) where given.

    Runs on `threads` threads (torch's number by default). Raises FormatError for a format without panels.
    """
    form = tiled_format(packed)
    if form is None:
        raise FormatError(f"{packed.format.name}: there is no panel layout of this format")
    if packed.format is form:
        raise FormatError(f"{packed.format.name}: already in panels")
    source = native_weight(packed)
    assert source is not None
    if out is None:
        out = torch.empty(form.bytes_for(*packed.shape), dtype=torch.uint8)
    result = NativeWeight(form, packed.shape, out, source.scales if form.keeps_scales else None)
    library.load().loci_tile(threads or torch.get_num_threads(), source.address, out.data_ptr())
    return result


def untile(packed: PackedTensor, rows: torch.Tensor | None = None) -> PackedTensor:
    """A tiled weight back in file layout; with `rows` (`[n]` int64) only those, in that order."""
    form, source = packed.format, native_weight(packed)
    assert isinstance(form, Tiled)
    assert source is not None
    cols, base = packed.shape[1], form.base
    scales: torch.Tensor | None = None
    if isinstance(base, FourBit):
        count = packed.shape[0] if rows is None else len(rows)
        scales = torch.empty(base.scale_shape(count, cols), dtype=base.scale_dtype)
    elif packed.scales is not None:
        scales = packed.scales if rows is None else packed.scales[rows // base.tile_rows]
    rows = torch.arange(packed.shape[0]) if rows is None else rows.contiguous()
    codes = torch.empty((len(rows), form.code_bytes(cols)), dtype=torch.uint8)
    library.load().loci_untile(
        torch.get_num_threads(),
        source.address,
        rows.data_ptr(),
        len(rows),
        codes.data_ptr(),
        0 if scales is None else scales.data_ptr(),
    )
    return PackedTensor(base, (len(rows), cols), codes, scales)
