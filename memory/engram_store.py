"""The Engram store: rows of n-gram tables, asked for before they are needed.

A table that fits into its share of the budget is held in DRAM as a whole. Of a larger one only hot rows
are: the rest is read from disk, a few 4-KiB blocks for each look-up, many requests at once. Every look-up
runs on the store's own thread; duplicates are looked up once.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from memory.checkpoint import Checkpoint, TensorEntry
from memory.disk import BLOCK, DirectFiles
from memory.telemetry import Telemetry
from memory.transfer import Link, Priority, Ticket
from quant.formats import Format
from quant.kernels import Kernels
from quant.packed import PackedTensor
from quant.stored import unpack

WAYS = 8  # rows that share a place in the cache of hot rows
READERS = 16  # requests to the disk at once


@dataclass(frozen=True)
class TableFiles:
    """Where a table `[rows, dim]` is: its codes and scales, and the format they are in, row by row."""

    codes: TensorEntry
    scales: TensorEntry
    format: Format
    dim: int

    @property
    def code_bytes(self) -> int:
        """Bytes of a row's codes."""
        return self.codes.nbytes // self.codes.shape[0]

    @property
    def scale_bytes(self) -> int:
        """Bytes of a row's scales."""
        return self.scales.nbytes // self.scales.shape[0]

    @property
    def row_bytes(self) -> int:
        """Bytes of a row, codes and scales."""
        return self.code_bytes + self.scale_bytes

    def unpack(self, codes: torch.Tensor, scales: torch.Tensor) -> PackedTensor:
        """Rows from the raw bytes of their codes `[n, code_bytes]` and scales `[n, scale_bytes]`."""
        shape = (codes.shape[0], self.dim)
        return unpack(self.format, shape, codes.flatten(), scales.flatten(), self.scales.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole table."""
        return self.codes.nbytes + self.scales.nbytes


class RowsTicket:
    """The promise of a look-up."""

    def __init__(self, ticket: Ticket, answer: list[torch.Tensor]) -> None:
        self._ticket = ticket
        self._answer = answer

    def wait(self) -> torch.Tensor:
        """The rows, `[n, dim]` float32; waiting here counts as the store's stall."""
        self._ticket.wait()
        return self._answer[0]


class HotRows:
    """A set-associative cache of packed rows: `sets * WAYS` of them, least recently used leaves its set."""

    def __init__(self, rows: int, row_bytes: int) -> None:
        self.sets = max(rows // WAYS, 1)
        self._tags = np.full((self.sets, WAYS), -1, dtype=np.int64)
        self._stamps = np.zeros((self.sets, WAYS), dtype=np.int64)
        self._bytes = np.empty((self.sets * WAYS, row_bytes), dtype=np.uint8)
        self._now = 0

    @property
    def nbytes(self) -> int:
        """Bytes of rows, tags and stamps."""
        return self._bytes.nbytes + self._tags.nbytes + self._stamps.nbytes

    @staticmethod
    def rows_within(budget_bytes: int, row_bytes: int) -> int:
        """Rows that a cache of `budget_bytes` holds."""
        return budget_bytes // (row_bytes + 16)

    def find(self, rows: np.ndarray, out: np.ndarray) -> np.ndarray:
        """Copy rows that are held into `out` `[n, row_bytes]`; which ones, bool `[n]`."""
        self._now += 1
        where = rows % self.sets
        matches = self._tags[where] == rows[:, None]  # [n, ways]
        found: np.ndarray = matches.any(1)
        at, way = where[found], matches.argmax(1)[found]
        out[found] = self._bytes[at * WAYS + way]
        self._stamps[at, way] = self._now
        return found

    def keep(self, rows: np.ndarray, packed: np.ndarray) -> None:
        """Hold unique `rows` `[n]` with their bytes `[n, row_bytes]`, in place of the oldest of their sets.

        Of new rows that share a set, one is kept for each call; the others will come again if they are hot.
        """
        where, first = np.unique(rows % self.sets, return_index=True)
        way = self._stamps[where].argmin(1)
        self._tags[where, way] = rows[first]
        self._stamps[where, way] = self._now
        self._bytes[where * WAYS + way] = packed[first]


class _WholeTable:
    """A table in DRAM."""

    def __init__(self, files: TableFiles, checkpoint: Checkpoint) -> None:
        self._files = files
        self._codes = checkpoint.map(files.codes.name).view(-1, files.code_bytes).clone()
        self._scales = checkpoint.map(files.scales.name).view(-1, files.scale_bytes).clone()

    @property
    def nbytes(self) -> int:
        return self._codes.nbytes + self._scales.nbytes

    def rows(self, rows: np.ndarray, telemetry: Telemetry) -> PackedTensor:
        at = torch.from_numpy(rows)
        telemetry.add("rows", "cached", len(rows))
        return self._files.unpack(self._codes[at], self._scales[at])


class _TableOnDisk:
    """A table on disk, with hot rows in DRAM."""

    def __init__(
        self, files: TableFiles, budget_bytes: int, direct: DirectFiles, pool: ThreadPoolExecutor
    ) -> None:
        self._files = files
        self._direct = direct
        self._pool = pool
        direct.open([files.codes.file, files.scales.file])
        self._hot = HotRows(HotRows.rows_within(budget_bytes, files.row_bytes), files.row_bytes)

    @property
    def nbytes(self) -> int:
        return self._hot.nbytes

    def rows(self, rows: np.ndarray, telemetry: Telemetry) -> PackedTensor:
        files = self._files
        packed = np.empty((len(rows), files.row_bytes), dtype=np.uint8)
        found = self._hot.find(rows, packed)
        missing = rows[~found]
        telemetry.add("rows", "cached", int(found.sum()))
        telemetry.add("rows", "read", len(missing))
        if len(missing):
            fresh = np.concatenate(
                (
                    self._read(files.codes, files.code_bytes, missing),
                    self._read(files.scales, files.scale_bytes, missing),
                ),
                axis=1,
            )
            packed[~found] = fresh
            self._hot.keep(missing, fresh)
        codes = torch.from_numpy(packed[:, : files.code_bytes].copy())
        scales = torch.from_numpy(packed[:, files.code_bytes :].copy())
        return files.unpack(codes, scales)

    def _read(self, entry: TensorEntry, width: int, rows: np.ndarray) -> np.ndarray:
        """Bytes of some rows of a tensor with `width` bytes a row, `[n, width]`."""
        at = (entry.offset + rows * width)[:, None] + np.arange(width)  # byte positions in the file
        blocks = np.unique(at // BLOCK)
        content = self._direct.read_blocks(entry.file, blocks, self._pool)
        picked: np.ndarray = content[np.searchsorted(blocks, at // BLOCK), at % BLOCK]
        return picked


class EngramStore:
    """Tables by layer, within a budget. `lookup` may be called as soon as token ids are known."""

    def __init__(
        self,
        tables: Mapping[int, TableFiles],
        checkpoint: Checkpoint,
        kernels: Kernels,
        budget_bytes: int,
        telemetry: Telemetry,
    ) -> None:
        self._kernels = kernels
        self._telemetry = telemetry
        self._direct = DirectFiles()
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="loci-engram-read")
        self._link = Link("engram", telemetry)
        total = sum(files.nbytes for files in tables.values())
        self._tables: dict[int, _WholeTable | _TableOnDisk] = {}
        for layer, files in tables.items():
            share = budget_bytes * files.nbytes // max(total, 1)
            if share >= files.nbytes:
                self._tables[layer] = _WholeTable(files, checkpoint)
            else:
                self._tables[layer] = _TableOnDisk(files, share, self._direct, self._pool)

    @property
    def nbytes(self) -> int:
        """Bytes of DRAM that tables and caches hold."""
        return sum(table.nbytes for table in self._tables.values())

    def lookup(self, layer: int, rows: torch.Tensor) -> RowsTicket:
        """Ask for rows `[n]` int64 (repeats are fine) of a layer's table."""
        answer: list[torch.Tensor] = []
        table = self._tables[layer]

        def work() -> None:
            unique, back = np.unique(rows.numpy(), return_inverse=True)
            self._telemetry.add("rows", "asked", len(rows))
            self._telemetry.add("rows", "unique", len(unique))
            packed = table.rows(unique, self._telemetry)
            answer.append(self._kernels.gather_rows(packed, torch.from_numpy(back)))

        return RowsTicket(self._link.submit([work], 0, Priority.DEMAND), answer)

    def close(self) -> None:
        """End the threads and close the files."""
        self._link.close()
        self._pool.shutdown()
        self._direct.close()
