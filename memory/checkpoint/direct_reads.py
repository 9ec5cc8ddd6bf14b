"""Direct reads: file ranges into memory bypassing the page cache, aligned and coalesced.

The page cache would hold every expert twice and evict by its own rules; O_DIRECT reads leave the
decision to the expert store. File systems that refuse O_DIRECT (tmpfs, some overlays) are read
through the cache, which is slower to evict but gives the same bytes.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from memory.checkpoint.entries import TensorEntry
from memory.checkpoint.reads import open_to_read, read_into
from memory.transfer import CancelledError
from quant.errors import CheckpointError

BLOCK = 4096  # O_DIRECT requires offsets, lengths and addresses to be multiples of this
MAX_GAP = 256 << 10  # ranges closer together than this are read with one request
PIECE = 2 << 20  # bytes between two checks of whether the rest is still needed


@dataclass(frozen=True)
class Range:
    """A range of bytes read with one request, and the tensors in it."""

    file: Path
    start: int
    stop: int
    entries: tuple[TensorEntry, ...]


def coalesce(entries: Sequence[TensorEntry]) -> list[Range]:
    """The fewest ranges that cover all `entries`, each aligned to blocks."""
    ranges: list[Range] = []
    for entry in sorted(entries, key=lambda e: (str(e.file), e.offset)):
        start = entry.offset // BLOCK * BLOCK
        stop = -(-(entry.offset + entry.nbytes) // BLOCK) * BLOCK
        last = ranges[-1] if ranges else None
        if last is not None and last.file == entry.file and start - last.stop <= MAX_GAP:
            joined = Range(last.file, last.start, max(last.stop, stop), (*last.entries, entry))
            ranges[-1] = joined
        else:
            ranges.append(Range(entry.file, start, stop, (entry,)))
    return ranges


class DirectFiles:
    """Open files read with O_DIRECT. Thread-safe: every read passes its own offset."""

    def __init__(self) -> None:
        self._descriptors: dict[Path, int] = {}
        self._scratch = threading.local()

    def open(self, files: Sequence[Path]) -> None:
        """Open `files` once, before threads read from them. Raises CheckpointError."""
        for file in files:
            if file in self._descriptors:
                continue
            try:
                descriptor = open_to_read(file, getattr(os, "O_DIRECT", 0))
            except CheckpointError:
                descriptor = open_to_read(file)
            self._descriptors[file] = descriptor

    def close(self) -> None:
        """Close all files."""
        for descriptor in self._descriptors.values():
            with suppress(OSError):
                os.close(descriptor)
        self._descriptors.clear()

    def read(self, ranges: Sequence[Range], stop: threading.Event | None = None) -> dict[str, torch.Tensor]:
        """The raw bytes of the tensors of `ranges`, uint8 `[nbytes]` each, in a buffer of the calling thread.

        They stay valid until the thread's next read: new memory for each read would have to be zeroed first,
        which takes longer than the read. Raises CheckpointError if a file has been truncated, and
        CancelledError soon after `stop` is set.
        """
        buffer = self._buffer(sum(part.stop - part.start for part in ranges))
        whole = torch.frombuffer(buffer, dtype=torch.uint8)
        found: dict[str, torch.Tensor] = {}
        at = 0
        for part in ranges:
            self._read_range(part, memoryview(buffer)[at : at + part.stop - part.start], stop)
            for entry in part.entries:
                start = at + entry.offset - part.start
                found[entry.name] = whole[start : start + entry.nbytes]
            at += part.stop - part.start
        return found

    def _read_range(self, part: Range, view: memoryview, stop: threading.Event | None = None) -> None:
        needed = max(entry.offset + entry.nbytes for entry in part.entries) - part.start
        piece = needed if stop is None else PIECE
        for at in range(0, needed, piece):
            if stop is not None and stop.is_set():
                raise CancelledError(f"{part.file}: no longer needed", moved_bytes=at)
            of = view[at : at + piece] if at + piece < needed else view[at:]
            read_into(self._descriptors[part.file], of, part.start + at, min(piece, needed - at), part.file)

    def _buffer(self, nbytes: int) -> mmap.mmap:
        """The calling thread's buffer, page-aligned, of at least `nbytes`."""
        buffer: mmap.mmap | None = getattr(self._scratch, "buffer", None)
        if buffer is None or len(buffer) < nbytes:
            buffer = self._scratch.buffer = _huge_pages(nbytes)
        return buffer

    def descriptor(self, file: Path) -> int:
        """The descriptor of an open file, for native readers, which must align their reads to blocks."""
        return self._descriptors[file]

    def load(self, entry: TensorEntry) -> torch.Tensor:
        """The raw bytes of a tensor of any size, uint8 `[nbytes]`, in memory of their own.

        Raises CheckpointError where they cannot be read.
        """
        part = coalesce([entry])[0]
        buffer = _huge_pages(max(part.stop - part.start, BLOCK))
        self._read_range(part, memoryview(buffer))
        start = entry.offset - part.start
        return torch.frombuffer(buffer, dtype=torch.uint8)[start : start + entry.nbytes]


def _huge_pages(nbytes: int) -> mmap.mmap:
    """New memory that begins on a page, in huge ones where the system has them: fewer to pin for a read, and
    fewer to look up for rows at random."""
    buffer = mmap.mmap(-1, nbytes)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            buffer.madvise(mmap.MADV_HUGEPAGE)
    return buffer
