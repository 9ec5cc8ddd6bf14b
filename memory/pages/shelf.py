"""Pages in host memory that can stand behind addresses of several owners at once.

They are in a file without a name. Who has them behind an address may write there: the system then gives that
address a page of its own (a private mapping), and nobody else sees what is written.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from dataclasses import dataclass
from typing import Any

import torch

PAGE = mmap.PAGESIZE
_KEEP_SIZE, _PUNCH_HOLE = 1, 2  # fallocate's flags
_FIXED, _NO_RESERVE = 0x10, 0x4000  # mmap's


@dataclass(eq=False)
class Shelved:
    """Whole pages on a shelf.

    at      where in the file
    users   who needs them: they are given back when there is none
    """

    at: int
    nbytes: int
    users: int = 1


class Shelf:
    """Keeps pages. Raises OSError where the system has no such files."""

    def __init__(self) -> None:
        self._libc = _libc()
        self._file = os.memfd_create("loci-shelf", os.MFD_CLOEXEC)
        self._end = 0
        self._nbytes = 0
        weakref.finalize(self, os.close, self._file)

    @property
    def nbytes(self) -> int:
        """Bytes of all pages that are kept."""
        return self._nbytes

    @property
    def allocated_bytes(self) -> int:
        """What the system says that they take."""
        return os.fstat(self._file).st_blocks * 512

    def keep(self, values: torch.Tensor) -> Shelved:
        """A copy of whole pages, `[bytes]` uint8. Raises OSError where there is no memory for it."""
        kept = Shelved(self._end, values.nbytes)
        left, at = _bytes_of(values), kept.at
        try:
            while left:
                count = os.pwrite(self._file, left, at)
                left, at = left[count:], at + count
        except OSError:
            self._punch(kept)
            raise
        self._end += kept.nbytes
        self._nbytes += kept.nbytes
        return kept

    def read(self, kept: Shelved, start: int, into: torch.Tensor) -> None:
        """Copy bytes from `start` on into `[bytes]` uint8."""
        left, at = _bytes_of(into), kept.at + start
        while left:
            count = os.preadv(self._file, [left], at)
            left, at = left[count:], at + count

    def drop(self, kept: Shelved) -> None:
        """One user less."""
        kept.users -= 1
        if kept.users == 0:
            self._punch(kept)
            self._nbytes -= kept.nbytes

    def stand_behind(self, address: int, kept: Shelved, nbytes: int) -> None:
        """Put the first `nbytes`, whole pages, behind an address instead of what is there. One user more,
        until `stand_back`."""
        self._map(address, nbytes, mmap.MAP_PRIVATE | _FIXED | _NO_RESERVE, self._file, kept.at)
        kept.users += 1

    def stand_back(self, address: int, kept: Shelved, nbytes: int) -> None:
        """Put memory of its own behind the address again: zeros."""
        self._map(address, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _FIXED | _NO_RESERVE, -1, 0)
        self._libc.madvise(address, nbytes, getattr(mmap, "MADV_NOHUGEPAGE", 15))  # as in HostSpace
        self.drop(kept)

    def _map(self, address: int, nbytes: int, flags: int, file: int, at: int) -> None:
        found = self._libc.mmap(address, nbytes, mmap.PROT_READ | mmap.PROT_WRITE, flags, file, at)
        if found != address:
            raise OSError(ctypes.get_errno(), f"mmap: {os.strerror(ctypes.get_errno())}")

    def _punch(self, kept: Shelved) -> None:
        if self._libc.fallocate(self._file, _KEEP_SIZE | _PUNCH_HOLE, kept.at, kept.nbytes) != 0:
            raise OSError(ctypes.get_errno(), f"fallocate: {os.strerror(ctypes.get_errno())}")


def _bytes_of(values: torch.Tensor) -> memoryview:
    shared: Any = values.numpy()
    return memoryview(shared)


def _libc() -> ctypes.CDLL:
    """Raises OSError."""
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype, libc.mmap.argtypes = ctypes.c_void_p, [
            ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64,
        ]  # fmt: skip
        libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
        if not hasattr(os, "memfd_create"):
            raise AttributeError("memfd_create")
    except AttributeError as error:
        raise OSError(f"no {error} on this system") from None
    return libc
