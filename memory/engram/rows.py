"""Row lookups on native threads; neither they nor their waiters hold the GIL."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass

import torch

from quant.errors import CheckpointError
from quant.kernels.cpu import library

WAYS = 8  # ways per set of the hot-row cache
TAG_BYTES = 12  # per hot row: its tag and the time of its last use
_NO_SUCH_ROW, _FILE_ENDS, _CLOSED = -1, -2, -3


class RowTable(ctypes.Structure):
    """`RowTable` of quant/kernels/cpu/native_src/table_rows.hpp."""

    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("cols", ctypes.c_int64),
        ("code_bytes", ctypes.c_int64),
        ("scale_bytes", ctypes.c_int64),
        ("decodes", ctypes.c_int64),
        ("float_scales", ctypes.c_int64),
        ("codes_file", ctypes.c_int64),
        ("codes_at", ctypes.c_int64),
        ("scales_file", ctypes.c_int64),
        ("scales_at", ctypes.c_int64),
        ("sets", ctypes.c_int64),
        ("tags", ctypes.c_void_p),
        ("stamps", ctypes.c_void_p),
        ("hot", ctypes.c_void_p),
    )


class RowCounts(ctypes.Structure):
    """`RowCounts` of table_rows.hpp: rows by where they were found, bytes read, and the time it took."""

    _fields_ = (
        ("asked", ctypes.c_int64),
        ("unique", ctypes.c_int64),
        ("cached", ctypes.c_int64),
        ("read", ctypes.c_int64),
        ("read_bytes", ctypes.c_int64),
        ("nanoseconds", ctypes.c_int64),
    )


@dataclass(frozen=True)
class TableShare:
    """What of a table is in DRAM: all of it, or the hottest rows, beside the scales of all rows where these
    take no more than half of the budget: a missing row then costs one read instead of two.

    sets    of WAYS hot rows each
    nbytes  of all that, with what finds the rows
    """

    is_whole: bool
    holds_scales: bool
    sets: int
    nbytes: int

    @classmethod
    def within(cls, budget_bytes: int, rows: int, code_bytes: int, scale_bytes: int) -> TableShare:
        """What a budget holds of a table of so many rows, each of so many bytes of codes and of scales."""
        whole, scales = rows * (code_bytes + scale_bytes), rows * scale_bytes
        if budget_bytes >= whole:
            return cls(True, True, 0, whole)
        holds_scales = 2 * scales <= budget_bytes
        left = max(0, budget_bytes - (scales if holds_scales else 0))
        of_set = WAYS * (code_bytes + (0 if holds_scales else scale_bytes) + TAG_BYTES)
        sets = left // of_set
        return cls(False, holds_scales, sets, sets * of_set + (scales if holds_scales else 0))


@dataclass(frozen=True)
class HotRows:
    """Memory of a set-associative cache of packed rows with LRU eviction within each set."""

    sets: int
    tags: torch.Tensor
    stamps: torch.Tensor
    rows: torch.Tensor

    @classmethod
    def of(cls, sets: int, row_bytes: int) -> HotRows:
        """So many sets, still empty."""
        return cls(
            sets,
            torch.full((sets, WAYS), -1, dtype=torch.int64),
            torch.zeros(sets, WAYS, dtype=torch.int32),
            torch.empty(sets, WAYS, row_bytes, dtype=torch.uint8),
        )

    @property
    def nbytes(self) -> int:
        """Bytes of rows, tags and stamps."""
        return self.tags.nbytes + self.stamps.nbytes + self.rows.nbytes


class RowJob:
    """A pending lookup; `out` is filled once `wait` has returned."""

    def __init__(self, pointer: int, out: torch.Tensor) -> None:
        self._library = library.load()
        self._pointer = pointer
        self.out = out

    def __del__(self) -> None:
        self._library.loci_rows_forget(self._pointer)  # blocks: `out` must stay alive while it is written

    @property
    def is_done(self) -> bool:
        """True once `wait` would not block."""
        return bool(self._library.loci_rows_done(self._pointer))

    def wait(self) -> RowCounts:
        """Wait for the rows. Raises CheckpointError where they cannot be read, IndexError for no such row."""
        counts = RowCounts()
        error = self._library.loci_rows_wait(self._pointer, ctypes.byref(counts))
        if error == _NO_SUCH_ROW:
            raise IndexError("the table does not have a requested row")
        if error == _CLOSED:
            raise RuntimeError("the Engram row store was closed")
        if error == _FILE_ENDS:
            raise CheckpointError("the file has been truncated; download it again")
        if error:
            raise CheckpointError(
                f"rows cannot be read ({os.strerror(error)}); is the drive still connected?"
            )
        return counts


class RowServer:
    """`threads` native threads that look rows up in tables. Tables are added first."""

    def __init__(self, threads: int) -> None:
        self._library = library.load()
        level = library.LEVELS.index(library.available_levels()[-1])
        self._pointer: int | None = self._library.loci_rows_open(level, threads)

    def add(self, table: RowTable) -> int:
        """Register a table and return its number; its memory must stay valid until `close`."""
        return int(self._library.loci_rows_add(self._pointer, ctypes.byref(table)))

    def ask(self, table: int, rows: torch.Tensor, out: torch.Tensor) -> RowJob:
        """Look up rows `[n]` int64 into `out`, n rows of floats or of bytes."""
        if rows.dtype != torch.int64 or not rows.is_contiguous():
            rows = rows.to(torch.int64).contiguous()
        if self._pointer is None:
            raise RuntimeError("the Engram row store is closed")
        args = (table, rows.data_ptr(), len(rows), out.data_ptr())
        return RowJob(self._library.loci_rows_ask(self._pointer, *args), out)

    def close(self) -> None:
        """Stop the threads; queued lookups fail."""
        if self._pointer is not None:
            self._library.loci_rows_close(self._pointer)
            self._pointer = None
