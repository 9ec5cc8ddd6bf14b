"""The state of attention over a window and over entries that stand for groups of tokens, layer by layer.

Per slot and layer: a ring with the latents of the last tokens; and of each kind of entries that the layer
makes (what it attends to, and perhaps keys by which it chooses), all that are complete, and rings with the
projections of the last tokens, whose group may not be complete. Rings are a few tokens longer than their
readers need, so that a slot can go back that far. Entries take memory as a sequence grows (pages.py); the
rest is allocated at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.cache.rings import extend_ring
from engine.families.base import KvCache, Segment
from memory.pages.spaces import zeros
from quant.formats.kv import EXACT, GroupedRows
from quant.formats.rows import RowFormat, Rows, bytes_of, like, row_bytes, rows_in, stored_as


@dataclass(frozen=True)
class Groups:
    """A kind of entries that a layer makes: one of `dim` values for each `ratio` tokens.

    overlaps  an entry is also made of the tokens of the group before: they have projections for both
    """

    ratio: int
    dim: int
    overlaps: bool

    @property
    def width(self) -> int:
        """Values of a token's projection."""
        return 2 * self.dim if self.overlaps else self.dim

    @property
    def reach(self) -> int:
        """Tokens that an entry is made of."""
        return 2 * self.ratio if self.overlaps else self.ratio


@dataclass(frozen=True)
class GroupedShape:
    """The parameters that determine the size of a GroupedCache.

    groups   of each layer, the kinds of entries that it makes
    margin   how many of its last tokens a slot can roll back
    devices  of each layer's state
    rows     how windows, entries and index keys are kept
    """

    window: int
    head_dim: int
    groups: tuple[tuple[Groups, ...], ...]
    margin: int
    devices: tuple[torch.device, ...]
    rows: GroupedRows = EXACT

    def row_format(self, kind: int) -> RowFormat | None:
        """How the entries of a layer's first kind, or the index keys that are its second, are kept."""
        return self.rows.index_keys if kind else self.rows.entries

    def entry_bytes(self, layer: int) -> tuple[int, ...]:
        """Bytes of an entry of each kind that a layer makes."""
        return tuple(row_bytes(g.dim, self.row_format(kind)) for kind, g in enumerate(self.groups[layer]))

    def open_rows(self, groups: Groups) -> int:
        """Tokens whose projections are kept."""
        return groups.reach - 1 + self.margin

    def nbytes(self, slots: int, capacity: int) -> int:
        """Bytes of a cache of this shape."""
        return sum(self.layer_bytes(layer, slots, capacity) for layer in range(len(self.groups)))

    def layer_bytes(self, layer: int, slots: int, capacity: int) -> int:
        """Bytes of one layer's part."""
        kinds = zip(self.groups[layer], self.entry_bytes(layer), strict=True)
        return slots * (
            self.fixed_bytes(layer) + sum(capacity // groups.ratio * nbytes for groups, nbytes in kinds)
        )

    def fixed_bytes(self, layer: int) -> int:
        """Bytes of a slot's part that do not grow with its sequence."""
        floats = sum(2 * self.open_rows(groups) * groups.width for groups in self.groups[layer])
        window = (self.window + self.margin) * row_bytes(self.head_dim, self.rows.window)
        return window + torch.float32.itemsize * floats


@dataclass(frozen=True)
class GroupState:
    """Entries of one kind, of one layer; the first dimension is the slot.

    entries             `[slots, capacity // ratio, dim]`, float32 or encoded
    open_kv, open_gate  `[slots, open_rows, width]`: rings of the last tokens' projections
    """

    groups: Groups
    entries: Rows
    open_kv: torch.Tensor
    open_gate: torch.Tensor

    def extend(
        self, segment: Segment, kv: torch.Tensor, gate: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store a segment's projections `[L, width]`; return them behind those of the tokens before that the
        entries are made of which they can complete: of the unfinished group, and where groups overlap of the
        one before it."""
        ratio = self.groups.ratio
        before = min(segment.start, segment.start % ratio + self.groups.reach - ratio)
        return (
            extend_ring(self.open_kv[segment.slot], segment.start, before, kv),
            extend_ring(self.open_gate[segment.slot], segment.start, before, gate),
        )


class GroupedCache(KvCache):
    """KvCache for models whose layers see a window, and entries of their own.

    windows  `[slots, window + margin, head_dim]` of each layer
    states   of each layer, by kind of entries
    """

    def __init__(self, shape: GroupedShape, slots: int, capacity: int) -> None:
        super().__init__(slots, capacity, margin=shape.margin)
        self.shape = shape
        width, dtype = stored_as(shape.head_dim, shape.rows.window)
        self.windows = [
            rows_in(zeros((slots, shape.window + shape.margin, width), device, dtype), shape.rows.window)
            for device in shape.devices
        ]
        self.states = [
            tuple(self._state(groups, shape.row_format(kind), device) for kind, groups in enumerate(kinds))
            for kinds, device in zip(shape.groups, shape.devices, strict=True)
        ]

    def bytes_at(self, tokens: int) -> int:
        return self.shape.nbytes(self.slots, tokens)

    def appended(self, slot: int) -> tuple[tuple[int, torch.Tensor], ...]:
        return tuple((state.groups.ratio, bytes_of(state.entries)[slot]) for state in self._all)

    def recent(self, slot: int, length: int) -> tuple[torch.Tensor, ...]:
        rings = [bytes_of(window)[slot] for window in self.windows]
        rings += [ring[slot] for state in self._all for ring in (state.open_kv, state.open_gate)]
        return tuple(ring[: min(length, len(ring))] for ring in rings)

    def extend_window(self, layer: int, segment: Segment, kv: Rows) -> Rows:
        """Store the segment's latents `[L, head_dim]`; return them behind the up to window-1 before them."""
        before, ring = min(self.shape.window - 1, segment.start), bytes_of(self.windows[layer])
        return like(kv, extend_ring(ring[segment.slot], segment.start, before, bytes_of(kv)))

    @property
    def _all(self) -> list[GroupState]:
        return [state for of_layer in self.states for state in of_layer]

    def _state(self, groups: Groups, form: RowFormat | None, device: torch.device) -> GroupState:
        width, dtype = stored_as(groups.dim, form)
        size = self.slots, self.capacity // groups.ratio, width
        entries = self.pages.reserve(size, slot_axis=0, ratio=groups.ratio, device=device, dtype=dtype)
        ring = self.slots, self.shape.open_rows(groups), groups.width
        return GroupState(groups, rows_in(entries, form), zeros(ring, device), zeros(ring, device))
