"""Memory of a cache's rows, taken as sequences grow and given back when they end.

Addresses are reserved for every slot at the cache's capacity, so rows lie at fixed addresses with fixed
strides. Memory is taken in pages, within a budget for each device, and counted to the byte.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import torch

from memory.pages.runs import run_bytes
from memory.pages.shelf import Shelf, Shelved
from memory.pages.space import Elsewhere, HostSpace, Space
from memory.pages.spaces import new_space, page_bytes_of
from memory.planner.search import largest
from quant.errors import BudgetError

# Of an ended sequence, as many tokens' pages stay with its slot while nothing else needs them: taking fresh
# ones costs the next sequence more than its rows.
KEPT_TOKENS = 4096
# Parts of slots that are shared at once: each is an entry or two of the 65,530 that Linux allows a process.
MOST_SHARED = 8192


class PoolShortError(BudgetError):
    """The pool has too few pages left now; it may have enough when a sequence has ended."""


@dataclass(frozen=True)
class RowsSize:
    """Rows of one kind: in each slot so many runs of consecutive rows, in pages of a device's memory."""

    device: str
    runs: int
    ratio: int
    row_bytes: int
    page_bytes: int


@dataclass(frozen=True)
class _Rows:
    """Rows of one kind of all slots: in each slot several runs of consecutive rows.

    runs    of each slot, where they begin, in bytes
    ratio   tokens of a row
    """

    space: Space
    device: torch.device
    runs: tuple[tuple[int, ...], ...]
    ratio: int
    row_bytes: int

    def run_bytes(self, tokens: int) -> int:
        """Bytes of a run's pages for so many tokens."""
        return run_bytes(tokens, self.ratio, self.row_bytes, self.space.page_bytes)

    def covers(self, run_bytes: int) -> int:
        """Tokens for which a run of so many bytes is enough."""
        return (run_bytes // self.row_bytes + 1) * self.ratio - 1

    def nbytes(self, tokens: int) -> int:
        """Bytes of a slot's pages for so many tokens."""
        return len(self.runs[0]) * self.run_bytes(tokens)


@dataclass(frozen=True)
class _Shared:
    """Pages of a slot that are on a shelf: `memory` `[bytes]` uint8 is where they stand."""

    shelf: Shelf
    memory: torch.Tensor
    kept: Shelved


def _covers(memory: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether `[bytes]` uint8 has all of the other's addresses."""
    begin, other_begin = memory.data_ptr(), other.data_ptr()
    return begin <= other_begin and other_begin + other.nbytes <= begin + memory.nbytes


class Pages:
    """Pages of a cache of `slots` slots.

    budgets  bytes of pages by device; None for all that the slots could take
    """

    def __init__(self, slots: int) -> None:
        self.budgets: dict[torch.device, int] | None = None
        self._rows: list[_Rows] = []
        self._tokens = [0] * slots  # what each slot has pages for
        self._covered = [0] * slots  # up to this length no more are needed
        self._shared: dict[int, list[_Shared]] = {}  # by slot
        self._idle: dict[int, None] = {}  # slots without a sequence that still have pages, the oldest first
        self._taken: dict[torch.device, int] = {}
        self._peak = 0

    def reserve(
        self,
        shape: Sequence[int],
        *,
        slot_axis: int,
        ratio: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> torch.Tensor:
        """Zeros `[..., rows, width]` of all slots, which are dimension `slot_axis`; a row holds `ratio`
        tokens. Memory is behind the rows of `hold` only. Raises BudgetError without addresses for them."""
        *outer, rows, width = shape
        row_bytes, page = width * dtype.itemsize, page_bytes_of(device)
        if not math.prod(shape):
            return torch.zeros(*shape, dtype=dtype, device=device)
        step = page // math.gcd(page, row_bytes)  # runs are whole pages, so that none is of two slots
        padded = -(-rows // step) * step
        space = new_space(math.prod(outer) * padded * row_bytes, device)
        whole = space.whole.view(dtype).view(*outer, padded, width)
        starts: list[list[int]] = [[] for _ in range(outer[slot_axis])]
        for number, place in enumerate(product(*map(range, outer))):
            starts[place[slot_axis]].append(number * padded * row_bytes)
        self._rows.append(_Rows(space, device, tuple(map(tuple, starts)), ratio, row_bytes))
        self._taken.setdefault(device, 0)
        return whole[..., :rows, :]

    @property
    def geometry(self) -> tuple[RowsSize, ...]:
        """How rows lie, without where."""
        return tuple(
            RowsSize(str(rows.device), len(rows.runs[0]), rows.ratio, rows.row_bytes, rows.space.page_bytes)
            for rows in self._rows
        )

    def count(self, sizes: Sequence[RowsSize], device_of: Callable[[str], torch.device]) -> None:
        """Count pages of rows that lie in another process; `device_of` says by which device here."""
        for size in sizes:
            device = device_of(size.device)
            runs = ((0,) * size.runs,) * len(self._tokens)
            self._rows.append(_Rows(Elsewhere(size.page_bytes), device, runs, size.ratio, size.row_bytes))
            self._taken.setdefault(device, 0)

    # ---------------------------------------------------------------------------------------- a slot's pages

    def hold(self, slot: int, tokens: int) -> None:
        """Take the pages that a sequence of so many tokens needs; those of slots without a sequence are given
        back first. Raises PoolShortError, and takes none, where the pool has too few."""
        was_idle = slot in self._idle
        self._idle.pop(slot, None)
        if tokens <= self._covered[slot]:
            return
        more = {device: self.nbytes(tokens, device) - self.nbytes(self._tokens[slot], device)
                for device in self._taken}  # fmt: skip
        while not self._has(more):
            if not self._idle:
                if was_idle:
                    self._idle[slot] = None
                raise PoolShortError(
                    f"the KV pool has no room for {tokens} tokens of a sequence now; it is {self._state()}"
                )
            self._trim(next(iter(self._idle)), 0)
        self._resize(slot, tokens)

    def release(self, slot: int) -> None:
        """The slot's sequence has ended: give back its pages, but for a few (KEPT_TOKENS) that stay until
        another sequence needs them. Those that it shared are given back to who else has them."""
        for shared in self._shared.pop(slot, ()):
            shared.shelf.stand_back(shared.memory.data_ptr(), shared.kept, shared.memory.nbytes)
        self._trim(slot, KEPT_TOKENS)
        if self._tokens[slot]:
            self._idle[slot] = None

    def trim(self, slot: int, tokens: int) -> None:
        """Give back the pages beyond so many tokens of a slot that holds no more."""
        self._trim(slot, tokens)

    @property
    def tokens(self) -> tuple[int, ...]:
        """How many tokens each slot has pages for."""
        return tuple(self._tokens)

    def of_slots(self) -> tuple[int, ...]:
        """Bytes of each slot's pages."""
        return tuple(map(self.nbytes, self._tokens))

    def held_bytes(self, slot: int) -> int:
        """Bytes of a slot's pages."""
        return self.nbytes(self._tokens[slot])

    # ------------------------------------------------------------------------------------------ shared ones

    def place_of(self, view: torch.Tensor) -> tuple[torch.Tensor, int] | None:
        """The memory `[bytes]` uint8 that a view is in, and where it begins there, if it is in one piece of
        the host's that is taken in pages."""
        if view.device.type != "cpu" or not view.numel() or not view.is_contiguous():
            return None
        for rows in self._rows:
            at = view.data_ptr() - rows.space.whole.data_ptr()
            if isinstance(rows.space, HostSpace) and 0 <= at < rows.space.whole.nbytes:
                return rows.space.whole, at
        return None

    def share(self, slot: int, shelf: Shelf, memory: torch.Tensor, kept: Shelved) -> bool:
        """Put the first pages of what is kept behind a part of a slot's memory, `[bytes]` uint8, until the
        slot is released; they still count as the slot's. False where that is one piece too many."""
        if sum(map(len, self._shared.values())) >= MOST_SHARED:
            return False
        shelf.stand_behind(memory.data_ptr(), kept, memory.nbytes)
        visible: list[_Shared] = []
        for shared in self._shared.get(slot, ()):
            if _covers(memory, shared.memory):
                shared.shelf.drop(shared.kept)  # nothing of it is to be seen any more
            else:
                visible.append(shared)
        self._shared[slot] = [*visible, _Shared(shelf, memory, kept)]
        return True

    def shared_with(self, kept: Shelved) -> int:
        """How often slots have pages in common with what is kept."""
        return sum(shared.kept is kept for of_slot in self._shared.values() for shared in of_slot)

    # ------------------------------------------------------------------------------------------ in all

    def nbytes(self, tokens: int, device: torch.device | None = None) -> int:
        """Bytes of pages of one sequence of so many tokens, on a device or on all."""
        return sum(rows.nbytes(tokens) for rows in self._rows if device is None or rows.device == device)

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """Where there are rows."""
        return tuple(self._taken)

    @property
    def taken(self) -> dict[torch.device, int]:
        """Bytes of all pages that slots have, by device."""
        return dict(self._taken)

    @property
    def taken_bytes(self) -> int:
        """Bytes of all pages that slots have."""
        return sum(self._taken.values())

    @property
    def peak_bytes(self) -> int:
        """The most that they ever had."""
        return self._peak

    @property
    def budget_bytes(self) -> int | None:
        """Bytes of all devices' budgets; None where there is none."""
        return None if self.budgets is None else sum(self.budgets.values())

    def longest(self, most: int) -> int:
        """Tokens of the longest sequence that fits into the budgets by itself, at most `most`."""

        def sizes(tokens: int) -> dict[torch.device, int]:
            return {device: self.nbytes(tokens, device) for device in self._taken}

        return self._largest(most, sizes, self.budgets or {})

    def fit(
        self,
        longest: int,
        rooms: Mapping[torch.device, int],
        total: int | None = None,
        most: int | None = None,
    ) -> int:
        """Set the budgets to what as many tokens as possible take, in sequences of up to `longest`: within
        `rooms` by device, `total` bytes of all, and `most` tokens; returns the tokens. `KvShape.pool_bytes`
        plans the same bytes."""
        slots = len(self._tokens)

        def sizes(tokens: int) -> dict[torch.device, int]:
            is_whole = tokens >= slots * longest  # all may be full, each with pages of its own
            return {
                device: slots * self.nbytes(longest, device) if is_whole else self.nbytes(tokens, device)
                for device in self._taken
            }

        tokens = self._largest(slots * longest if most is None else most, sizes, rooms, total)
        self.budgets = sizes(tokens)
        return tokens

    def _largest(
        self,
        most: int,
        sizes: Callable[[int], Mapping[torch.device, int]],
        rooms: Mapping[torch.device, int],
        total: int | None = None,
    ) -> int:
        def fits(tokens: int) -> bool:
            of_each = sizes(tokens)
            are_within = all(of_each.get(device, 0) <= room for device, room in rooms.items())
            return are_within and (total is None or sum(of_each.values()) <= total)

        return largest(fits, most)

    def _has(self, more: Mapping[torch.device, int]) -> bool:
        return self.budgets is None or all(
            self._taken[device] + nbytes <= self.budgets[device] for device, nbytes in more.items()
        )

    def _state(self) -> str:
        return f"{self.taken_bytes / 1e6:,.1f} of {(self.budget_bytes or 0) / 1e6:,.1f} MB full"

    def _trim(self, slot: int, tokens: int) -> None:
        if tokens < self._tokens[slot]:
            self._resize(slot, tokens)
        if not self._tokens[slot]:
            self._idle.pop(slot, None)

    def _resize(self, slot: int, tokens: int) -> None:
        """Take or give back pages, until the slot has those for so many tokens."""
        before = self._tokens[slot]
        sizes = [(rows, rows.run_bytes(before), rows.run_bytes(tokens)) for rows in self._rows]
        try:
            for rows, old, new in sizes:
                for start in rows.runs[slot] if new > old else ():
                    rows.space.take(start + old, new - old)
        except Exception:
            for rows, old, new in sizes:  # where nothing was taken yet, nothing is there to return
                for start in rows.runs[slot] if new > old else ():
                    rows.space.give_back(start + old, new - old)
            raise
        for rows, old, new in sizes:
            self._taken[rows.device] += len(rows.runs[slot]) * (new - old)
        self._tokens[slot] = tokens
        covered = (rows.covers(rows.run_bytes(tokens)) for rows in self._rows)
        self._covered[slot] = min(covered, default=1 << 62) if tokens else 0
        self._peak = max(self._peak, self.taken_bytes)
        for rows, old, new in sizes:  # counted already: where this fails, `hold` takes them anew
            for start in rows.runs[slot] if new < old else ():
                rows.space.give_back(start + new, old - new)
