"""Rows that a slot and the prefix cache have in common: whole pages of them, instead of copies.

Rows of a text that lie in one run of a slot's pages are kept as what is before the first whole page, the
pages, and what is behind the last. Restored into another slot they stand behind its addresses at the same
place within a page, since runs begin at pages, and rows at the same distance from the beginning. The page in
which a sequence goes on is its own, and so is one that it writes to after it was rolled back. Each user is
counted in full, so what is counted is never less than what there is: of a state that is forgotten, slots keep
what they need.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch

from engine.cache.pages import Pages
from memory.pages.shelf import PAGE, Shelf, Shelved

# Less is copied: every piece that is mapped is an entry in a table of the system's.
LEAST_BYTES = 16 * PAGE


@dataclass(frozen=True)
class SharedRows:
    """Rows of one kind, of a part of a text, by their bytes.

    head, tail  before and behind the whole pages, `[bytes]` uint8
    """

    head: torch.Tensor
    pages: Shelved
    tail: torch.Tensor
    dtype: torch.dtype
    shape: tuple[int, ...]  # of a row

    @property
    def nbytes(self) -> int:
        """Bytes of all."""
        return self.head.nbytes + self.pages.nbytes + self.tail.nbytes

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return math.prod(self.shape) * self.dtype.itemsize


Kept = torch.Tensor | SharedRows


class RowShelf:
    """Keeps rows of a cache's slots; in pages that they share where the system can."""

    def __init__(self, pages: Pages) -> None:
        self._pages = pages
        self.shelf: Shelf | None = None
        with suppress(OSError):  # then everything is copied
            self.shelf = Shelf()

    def keep(self, slot: int, view: torch.Tensor, first: int, stop: int) -> Kept:
        """Rows first to stop of a slot's `view` `[rows, ...]`; the slot goes on with what is kept."""
        rows = view[first:stop]
        place = self._pages.place_of(rows)
        if self.shelf is None or place is None:
            return rows.to("cpu", copy=True)
        memory, begin = place
        of_rows = memory[begin : begin + rows.nbytes]
        kept = self._keep(of_rows, -begin % PAGE, rows.dtype, rows.shape[1:])
        if isinstance(kept, SharedRows):
            head = kept.head.nbytes
            self._pages.share(slot, self.shelf, of_rows[head : head + kept.pages.nbytes], kept.pages)
        return kept

    def load(self, slot: int, view: torch.Tensor, first: int, kept: Kept, count: int) -> None:
        """Give a slot's `view` the first `count` rows that were kept, from row `first` on."""
        if isinstance(kept, torch.Tensor):
            view[first : first + count] = kept[:count]
            return
        if count == 0:
            return
        place = self._pages.place_of(view[first : first + count])
        assert place is not None
        assert self.shelf is not None
        memory, begin = place
        into = memory[begin : begin + count * kept.row_bytes]
        head, tail_at = kept.head.nbytes, kept.head.nbytes + kept.pages.nbytes
        into[:head] = kept.head[: len(into)]
        of_pages = into[head:tail_at]
        whole = len(of_pages) // PAGE * PAGE
        if whole < LEAST_BYTES or not self._pages.share(slot, self.shelf, of_pages[:whole], kept.pages):
            whole = 0
        self.shelf.read(kept.pages, whole, of_pages[whole:])
        into[tail_at:] = kept.tail[: max(0, len(into) - tail_at)]

    def split(self, kept: Kept, at: int) -> tuple[Kept, Kept]:
        """The first `at` rows, and the others; copies, since parts of one piece would keep all of it."""
        if isinstance(kept, torch.Tensor):
            return kept[:at].clone(), kept[at:].clone()
        assert self.shelf is not None
        whole = torch.empty(kept.nbytes, dtype=torch.uint8)
        head, tail_at = kept.head.nbytes, kept.head.nbytes + kept.pages.nbytes
        whole[:head], whole[tail_at:] = kept.head, kept.tail
        self.shelf.read(kept.pages, 0, whole[head:tail_at])
        self.drop(kept)
        cut = at * kept.row_bytes
        return (
            self._keep(whole[:cut], head, kept.dtype, kept.shape),
            self._keep(whole[cut:], (head - cut) % PAGE, kept.dtype, kept.shape),
        )

    def drop(self, kept: Kept) -> None:
        """Forget rows; slots that have their pages keep these."""
        if isinstance(kept, SharedRows) and self.shelf is not None:
            self.shelf.drop(kept.pages)

    def _keep(self, values: torch.Tensor, head: int, dtype: torch.dtype, shape: Sequence[int]) -> Kept:
        """Copies of rows, `[bytes]` uint8, the first whole page of which begins at byte `head`."""
        tail_at = head + max(0, len(values) - head) // PAGE * PAGE
        if self.shelf is not None and tail_at - head >= LEAST_BYTES:
            with suppress(OSError):
                pages = self.shelf.keep(values[head:tail_at])
                return SharedRows(values[:head].clone(), pages, values[tail_at:].clone(), dtype, tuple(shape))
        return values.clone().view(dtype).view(-1, *shape)
