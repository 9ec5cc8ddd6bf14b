"""Reads files so that a truncated file or a failing drive is an error and nothing worse.

Weights are never memory-mapped: touching a page of a mapped file that was truncated kills the process.
"""

from __future__ import annotations

import mmap
import os
import weakref
from pathlib import Path

import torch

from memory.checkpoint.entries import TensorEntry
from quant.errors import CheckpointError


def open_to_read(file: Path, flags: int = 0) -> int:
    """A descriptor of `file`. Raises CheckpointError."""
    try:
        return os.open(file, os.O_RDONLY | flags)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be opened ({error.strerror})") from None


def read_into(descriptor: int, view: memoryview, at: int, needed: int, file: Path) -> None:
    """Fill `view` with the bytes of `file` from byte `at` on: `needed` of them, the rest if they are there.

    Raises CheckpointError where the file ends before, or cannot be read.
    """
    done = 0
    while done < needed:
        # A short read ends at the end of the file, so what follows starts on a block again.
        try:
            count = os.preadv(descriptor, [view[done:]], at + done)
        except OSError as error:
            raise CheckpointError(
                f"{file}: cannot be read at byte {at + done} ({error.strerror}); is the drive still "
                "connected?"
            ) from None
        if count == 0:
            raise CheckpointError(f"{file}: ends at byte {at + done}; download it again")
        done += count


def read_tensor(entry: TensorEntry) -> torch.Tensor:
    """The raw bytes of a tensor, uint8 `[nbytes]`, in memory of their own. Raises CheckpointError.

    Pages of their own go back to the system at once when they are given up; an allocator keeps some.
    """
    pages = mmap.mmap(-1, max(entry.nbytes, 1))
    descriptor = open_to_read(entry.file)
    try:
        read_into(descriptor, memoryview(pages), entry.offset, entry.nbytes, entry.file)
    finally:
        os.close(descriptor)
    return torch.frombuffer(pages, dtype=torch.uint8)[: entry.nbytes]


class RowsOnDisk:
    """Rows of a tensor `[rows, ...]` that stays in its file; the page cache keeps what is asked for often."""

    def __init__(self, entry: TensorEntry, dtype: torch.dtype = torch.uint8) -> None:
        self._entry = entry
        self._dtype = dtype
        self._row_bytes = entry.nbytes // entry.shape[0]
        self._descriptor = open_to_read(entry.file)
        os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_RANDOM)  # neighbours are of no use
        weakref.finalize(self, os.close, self._descriptor)

    def __getitem__(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows `[n]` int64 as `[n, cols]`. Raises CheckpointError, IndexError for no such row."""
        out = torch.empty(len(rows), self._row_bytes, dtype=torch.uint8)
        places = [self._place(row) for row in rows.tolist()]
        if len(places) > 1:  # all on their way before the first is waited for
            for at in places:
                os.posix_fadvise(self._descriptor, at, self._row_bytes, os.POSIX_FADV_WILLNEED)
        for at, view in zip(places, out.numpy(), strict=True):
            read_into(self._descriptor, view.data, at, self._row_bytes, self._entry.file)
        return out.view(self._dtype)

    def _place(self, row: int) -> int:
        """Where a row begins in the file."""
        if not 0 <= row < self._entry.shape[0]:
            raise IndexError(f"{self._entry.name} has no row {row}")
        return self._entry.offset + row * self._row_bytes
