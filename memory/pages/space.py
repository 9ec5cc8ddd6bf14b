"""A range of addresses whose memory is taken in pages as it is needed, and given back.

Tensors lie at fixed addresses with fixed strides, as kernels and recorded programs need them, however much of
them is in use. In host memory a page is taken by the first write to it.
"""

from __future__ import annotations

import errno
import mmap
import resource
from pathlib import Path
from typing import Protocol

import torch

from quant.errors import BudgetError

# Linux's MAP_NORESERVE: addresses do not count as memory in use. Python names it from 3.13 on.
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
_STRICT = 2  # vm.overcommit_memory: every address counts


class Space(Protocol):
    """`whole` is all of it, `[bytes]` uint8. Offsets and lengths are multiples of `page_bytes`."""

    whole: torch.Tensor
    page_bytes: int

    def take(self, start: int, length: int) -> None:
        """Put memory, zeros, behind a part that has none. Raises BudgetError where there is no more."""

    def give_back(self, start: int, length: int) -> None:
        """Return the memory of a part; what it held is lost."""


class Elsewhere:
    """In another process: nothing is here, and pages are only counted."""

    def __init__(self, page_bytes: int) -> None:
        self.whole = torch.empty(0, dtype=torch.uint8)
        self.page_bytes = page_bytes

    def take(self, start: int, length: int) -> None:
        """The other process does."""

    def give_back(self, start: int, length: int) -> None:
        """The other process does."""


class HostSpace:
    """In host memory: a private mapping, whose untouched pages take nothing."""

    page_bytes = mmap.PAGESIZE

    def __init__(self, nbytes: int) -> None:
        """Raises BudgetError where the system grants no such range."""
        try:
            self._mapped = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE)
        except (OSError, OverflowError, ValueError) as error:
            raise BudgetError(_refused(nbytes, error)) from None
        if hasattr(mmap, "MADV_NOHUGEPAGE"):  # a huge page would take 2 MB for the first row of each layer
            try:
                self._mapped.madvise(mmap.MADV_NOHUGEPAGE)
            except OSError as error:
                if error.errno != errno.EINVAL:  # a kernel without huge pages
                    raise
        self.whole = torch.frombuffer(self._mapped, dtype=torch.uint8)

    def take(self, start: int, length: int) -> None:
        """Nothing: the first write does it."""

    def give_back(self, start: int, length: int) -> None:
        """Return the memory of a part; it reads as zeros until it is written again."""
        self._mapped.madvise(mmap.MADV_DONTNEED, start, length)


class WholeSpace:
    """Where nothing can be taken in pages: all of it is allocated at once."""

    page_bytes = 1

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.whole = torch.zeros(nbytes, dtype=torch.uint8, device=device)

    def take(self, start: int, length: int) -> None:
        """Nothing: it is there."""

    def give_back(self, start: int, length: int) -> None:
        """Nothing: it stays."""


def _refused(nbytes: int, error: Exception) -> str:
    """Why the system granted no range of so many bytes, and what helps."""
    text = (
        f"the system refuses {nbytes / 1e9:,.1f} GB of addresses for the KV cache ({error}): lower "
        "--max-model-len or --max-num-seqs"
    )
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        text += f", or raise the limit of addresses (ulimit -v, now {limit // 1024:,} kB)"
    elif _overcommit() == _STRICT:
        text += ", or set vm.overcommit_memory to 0 or 1: with 2, addresses count as memory"
    return text


def _overcommit() -> int | None:
    try:
        return int(Path("/proc/sys/vm/overcommit_memory").read_text())
    except (OSError, ValueError):
        return None
