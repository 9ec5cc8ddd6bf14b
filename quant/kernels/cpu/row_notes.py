"""What a recorder notes of tables: the embedding's rows, and those that a token's n-grams address."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from quant.kernels.cpu.notes import Notes
from quant.kernels.cpu.program import DENSE_KINDS, Buffer, Operand

MOST_HISTORY = 8  # earlier tokens that an n-gram's address may depend on


class _Ngrams(ctypes.Structure):
    """`Ngrams` of native_src/program_rows.cpp."""

    _fields_ = (
        ("keys", ctypes.c_void_p),
        ("pad", ctypes.c_int64),
        ("history", ctypes.c_int64),
        ("tables", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("multipliers", ctypes.c_void_p),
        ("primes", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("row_tables", ctypes.c_void_p),
    )


@dataclass(frozen=True)
class Ngrams:
    """How a token and those before it address rows of tables.

    keys         `[vocabulary]` int64, of each token id
    pad          the key before a sequence's beginning
    multipliers  `[tables, history + 1]` int64, the newest token's first
    primes, offsets  `[tables, columns]` int64: column `o * heads + h` is order `o + 2`, head `h`
    row_tables   `RowTable`s of native_src/table_rows.hpp, wholly in memory, of e4m3 rows
    row_width    values of a row
    """

    keys: torch.Tensor
    pad: int
    multipliers: torch.Tensor
    primes: torch.Tensor
    offsets: torch.Tensor
    heads: int
    row_tables: Sequence[ctypes.Structure]
    row_width: int

    @property
    def columns(self) -> int:
        """Rows per token and table."""
        return self.primes.shape[1]


class RowNotes(Notes):
    """Notes of operations on tables."""

    def embed(self, table: torch.Tensor, factor: float = 1.0) -> Buffer:
        """The tokens' rows of a plain table `[vocabulary, width]`, as float32, times a factor."""
        out = self.buffer(table.shape[1])
        sizes = [DENSE_KINDS[table.dtype], table.shape[1]]
        row_bytes = table.shape[1] * table.itemsize
        self._note("embed", [self._weight(table)], [out], sizes, factor, nbytes=row_bytes)
        return out

    def by_token(self, table: torch.Tensor) -> Buffer:
        """The tokens' rows of a table `[vocabulary, width]` int64."""
        out = self.buffer(table.shape[1], torch.int64)
        self._note("by_token", [self._weight(table)], [out], [table.shape[1]])
        return out

    def ngrams(self, ngrams: Ngrams, rings: torch.Tensor) -> Buffer:
        """The addresses of each token's rows, int64 `[rows, tables * columns]`. The tokens' keys are written
        to `rings` `[slots, ring]` of those of the last tokens."""
        tables, width = ngrams.multipliers.shape
        pointers = (ctypes.c_void_p * tables)(*(ctypes.addressof(table) for table in ngrams.row_tables))
        addresses = map(self._weight, (ngrams.keys, ngrams.multipliers, ngrams.primes, ngrams.offsets))
        keys, multipliers, primes, offsets = addresses
        native = _Ngrams(
            keys, ngrams.pad, width - 1, tables, ngrams.heads,
            multipliers, primes, offsets, ctypes.addressof(pointers),
        )  # fmt: skip
        self._recording.held += [native, pointers, *ngrams.row_tables]
        out = self.buffer(tables * ngrams.columns, torch.int64)
        outputs: list[Operand] = [self._address(rings), out]
        self._note("ngrams", [ctypes.addressof(native)], outputs, [rings.shape[1]])
        return out

    def table_rows(self, ngrams: Ngrams, table: int, addresses: Buffer, counts: torch.Tensor) -> Buffer:
        """The rows of a table that `ngrams` gave, float32, a token's side by side.

        counts  `[2]` int64, to which each run adds the rows that it has asked for, and the different ones
        """
        columns, width = ngrams.columns, ngrams.row_width
        out = self.buffer(columns * width)
        inputs: list[Operand] = [ctypes.addressof(ngrams.row_tables[table]), addresses]
        outputs: list[Operand] = [out, self._address(counts)]
        self._note("table_rows", inputs, outputs, [table, len(ngrams.row_tables), columns])
        return out
