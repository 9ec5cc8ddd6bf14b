"""Sequences that are put aside while the KV pool is short, and continue later with the same bits.

What a slot holds is copied to host memory that the prefix cache lends, or else to a file. Files have no name,
so nobody else finds the text, and they are gone when the process ends.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from engine.cache.prefixes import Prefixes
from engine.cache.stored_states import LEFT_ON_DISK
from engine.families.base import KvCache
from memory.user_files import make_folder

logger = logging.getLogger("loci.engine")

BLOCK_BYTES = 8 << 20  # written and read at a time
NO_ASIDE = "no sequences can be put aside there"


@dataclass(frozen=True)
class AsideOnDisk:
    """Where sequences may be put aside on disk, and how much of it they may take."""

    folder: Path
    budget_bytes: int


@dataclass(frozen=True)
class Kept:
    """The state of a sequence of `length` tokens that was put aside: in memory, or in a file."""

    length: int
    shortest: int
    nbytes: int
    tensors: tuple[torch.Tensor, ...] = ()
    file: IO[bytes] | None = None


@dataclass(frozen=True)
class AsideStats:
    """A snapshot for metrics: how often sequences were put aside, by where their state went (`again`:
    nowhere, so it is computed again). Bytes that are aside now, and of disk how many may be."""

    dram: int = 0
    disk: int = 0
    again: int = 0
    dram_bytes: int = 0
    disk_bytes: int = 0
    disk_budget_bytes: int = 0


class Aside:
    """Puts what a cache's slots hold aside, and brings it back. Used by one thread.

    lender  whose memory may be used; None for none
    disk    None: nothing goes to disk

    Raises ConfigError where the folder cannot be used.
    """

    def __init__(self, cache: KvCache, lender: Prefixes | None, disk: AsideOnDisk | None) -> None:
        self._cache, self._lender, self._disk = cache, lender, disk
        self._count = {"dram": 0, "disk": 0, "again": 0}
        self._in_memory = self._on_disk = 0
        if disk is not None:
            make_folder(disk.folder, NO_ASIDE)

    @property
    def stats(self) -> AsideStats:
        """Current counters and gauges."""
        budget = 0 if self._disk is None else self._disk.budget_bytes
        return AsideStats(**self._count, dram_bytes=self._in_memory, disk_bytes=self._on_disk,
                          disk_budget_bytes=budget)  # fmt: skip

    def put(self, slot: int) -> Kept | None:
        """Copy what `slot` holds; None where there is no place for it."""
        length, parts = self._cache.length(slot), list(self._parts(slot, self._cache.length(slot)))
        nbytes = sum(part.nbytes for part in parts)
        kept = self._to_memory(slot, length, nbytes, parts) or self._to_file(slot, length, nbytes, parts)
        where = "again" if kept is None else "dram" if kept.file is None else "disk"
        self._count[where] += 1
        return kept

    def bring_back(self, slot: int, kept: Kept) -> bool:
        """Restore a state into a slot that has pages for it, and drop it; False where its file cannot be
        read."""
        try:
            parts = list(self._parts(slot, kept.length))
            if kept.file is None:
                for part, held in zip(parts, kept.tensors, strict=True):
                    part.copy_(held)
            else:
                kept.file.seek(0)
                for part in parts:
                    _read(kept.file, part)
        except OSError as error:
            logger.warning("a sequence that was put aside is computed again: %s", error.strerror or error)
            return False
        finally:
            self.drop(kept)
        self._cache.resume(slot, kept.length, kept.shortest)
        return True

    def drop(self, kept: Kept) -> None:
        """Forget a state."""
        if kept.file is not None:
            kept.file.close()
            self._on_disk -= kept.nbytes
        elif self._lender is not None:
            self._lender.take_back(kept.nbytes)
            self._in_memory -= kept.nbytes

    def _parts(self, slot: int, length: int) -> Iterator[torch.Tensor]:
        """Views of all that a slot of `length` tokens holds."""
        for ratio, view in self._cache.appended(slot):
            yield view[: length // ratio]
        yield from self._cache.recent(slot, length)

    def _to_memory(self, slot: int, length: int, nbytes: int, parts: list[torch.Tensor]) -> Kept | None:
        if self._lender is None or not self._lender.lend(nbytes):
            return None
        try:
            held = tuple(part.to("cpu", copy=True) for part in parts)
        except RuntimeError as error:  # torch has no memory for it
            self._lender.take_back(nbytes)
            logger.warning("a sequence was not put aside in memory: %s", error)
            return None
        self._in_memory += nbytes
        return Kept(length, self._cache.shortest(slot), nbytes, held)

    def _to_file(self, slot: int, length: int, nbytes: int, parts: list[torch.Tensor]) -> Kept | None:
        disk = self._disk
        if disk is None or self._on_disk + nbytes > disk.budget_bytes:
            return None
        file: IO[bytes] | None = None
        try:
            if shutil.disk_usage(disk.folder).free - LEFT_ON_DISK < nbytes:
                return None
            file = tempfile.TemporaryFile(dir=disk.folder, buffering=0)  # noqa: SIM115 - `Kept` has it
            for part in parts:
                _write(file, part)
        except OSError as error:
            logger.warning("a sequence was not put aside on disk: %s", error.strerror or error)
            if file is not None:
                file.close()
            return None
        self._on_disk += nbytes
        return Kept(length, self._cache.shortest(slot), nbytes, (), file)


def _blocks(part: torch.Tensor) -> Iterator[torch.Tensor]:
    """A part in pieces of about BLOCK_BYTES, by its first dimension."""
    if part.numel():
        rows = max(1, BLOCK_BYTES // part[:1].nbytes)
        yield from (part[at : at + rows] for at in range(0, len(part), rows))


def _write(file: IO[bytes], part: torch.Tensor) -> None:
    for block in _blocks(part):
        values: Any = block.to("cpu").contiguous().flatten().view(torch.uint8).numpy()
        left = memoryview(values)
        while left:
            left = left[file.write(left) :]


def _read(file: IO[bytes], part: torch.Tensor) -> None:
    for block in _blocks(part):
        held = torch.empty(block.shape, dtype=block.dtype)
        values: Any = held.flatten().view(torch.uint8).numpy()
        left = memoryview(values)
        while left:
            count = os.readv(file.fileno(), [left])
            if not count:
                raise OSError("the file is shorter than what was written")
            left = left[count:]
        block.copy_(held)
