"""Encoded rows of a cache as the library reads and writes them."""

from __future__ import annotations

import ctypes
from functools import cache

import torch

from quant.formats.rows import CODES, SCALES, EncodedRows, RowFormat, Rows
from quant.kernels.cpu.native_calls import NativeCalls, floats


class NativeRowFormat(ctypes.Structure):
    """`RowFormat` of native_src/kernels.hpp."""

    _fields_ = (
        ("dim", ctypes.c_int64),
        ("code", ctypes.c_int64),
        ("scale", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("tail", ctypes.c_int64),
        ("is_turned", ctypes.c_int64),
        ("row_bytes", ctypes.c_int64),
    )


@cache  # a recorded step points to it: it stays where it is
def _native_format(form: RowFormat) -> NativeRowFormat:
    return NativeRowFormat(
        form.dim, CODES.index(form.code), SCALES.index(form.scale), form.group, form.tail, int(form.turned),
        form.row_bytes,
    )  # fmt: skip


def format_address(rows: Rows | RowFormat | None) -> int:
    """Where the library finds how rows are encoded: 0 for float32."""
    form = rows.format if isinstance(rows, EncodedRows) else rows
    return ctypes.addressof(_native_format(form)) if isinstance(form, RowFormat) else 0


def in_order(rows: Rows) -> torch.Tensor:
    """What the library reads of rows, one behind the other: float32 or bytes."""
    return floats(rows) if isinstance(rows, torch.Tensor) else rows.codes.contiguous()


class NativeRows(NativeCalls):
    """The part of `LayerOperations` that encodes rows."""

    def encode_rows(self, x: torch.Tensor, form: RowFormat | None) -> Rows:
        if form is None:
            return x
        x = floats(x)
        codes = torch.empty(*x.shape[:-1], form.row_bytes, dtype=torch.uint8)
        count = codes.numel() // form.row_bytes
        self._library.loci_encode_rows(
            self._level, self._threads(), format_address(form), x.data_ptr(), count, codes.data_ptr()
        )
        return EncodedRows(codes, form)
