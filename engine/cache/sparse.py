"""The state of window and compressed attention, for a fixed number of sequences of fixed capacity.

Per slot: rings with the latents of every layer's last tokens; for every kv source layer the compressed
entries, their index keys, and a ring with the projections of the last tokens, whose group may not be
complete; and a ring with the token keys that n-gram hashing looks back on. Rings are a few tokens longer
than their readers need, so that a slot can go back that far. Entries and index keys take memory as a
sequence grows (pages.py); the rest is allocated at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from engine.cache.rings import extend_ring
from engine.families.base import KvCache, Segment
from memory.pages.spaces import zeros
from quant.formats.kv import EXACT, GroupedRows
from quant.formats.rows import RowFormat, Rows, bytes_of, like, row_bytes, rows_in, stored_as


@dataclass(frozen=True)
class CacheShape:
    """The parameters that determine the size of a SparseCache.

    sources maps a kv source layer to its compression ratio; history is how many earlier token keys
    n-gram hashing needs, history_pad what stands before a sequence's start; margin is how many of
    its last tokens a slot can roll back; devices has the device of each layer's state; rows says how
    windows, entries and index keys are kept.
    """

    layers: int
    window: int
    head_dim: int
    index_dim: int
    sources: dict[int, int]
    history: int
    history_pad: int
    margin: int
    devices: tuple[torch.device, ...]
    rows: GroupedRows = EXACT

    def open_rows(self, ratio: int) -> int:
        """Tokens whose projections are kept: of the unfinished group, and of those before it."""
        return ratio - 1 + self.margin if ratio > 1 else 0

    @property
    def history_rows(self) -> int:
        """Tokens whose keys are kept."""
        return self.history + self.margin if self.history else 0

    def nbytes(self, slots: int, capacity: int) -> int:
        """Bytes of a cache of this shape."""
        layers = sum(self.layer_bytes(layer, slots, capacity) for layer in range(self.layers))
        return layers + slots * 8 * self.history_rows

    def layer_bytes(self, layer: int, slots: int, capacity: int) -> int:
        """Bytes of one layer's part."""
        nbytes = (self.window + self.margin) * row_bytes(self.head_dim, self.rows.window)
        if (ratio := self.sources.get(layer)) is not None:
            entry = row_bytes(self.head_dim, self.rows.entries)
            nbytes += capacity // ratio * (entry + row_bytes(self.index_dim, self.rows.index_keys))
            nbytes += 2 * self.open_rows(ratio) * row_bytes(self.head_dim, None)
        return slots * nbytes


@dataclass(frozen=True)
class SourceState:
    """One kv source layer's compressed state; the first dimension is the slot.

    entries `[slots, capacity // ratio, head_dim]`   index_keys `[slots, capacity // ratio, index_dim]`,
    float32 or encoded
    open_kv, open_gate `[slots, open_rows, head_dim]`: rings of the last tokens' projections
    """

    ratio: int
    entries: Rows
    index_keys: Rows
    open_kv: torch.Tensor
    open_gate: torch.Tensor


class SparseCache(KvCache):
    """KvCache for models with sliding windows and shared compressed entries."""

    def __init__(self, shape: CacheShape, slots: int, capacity: int) -> None:
        super().__init__(slots, capacity, margin=shape.margin)
        self.shape = shape
        width, dtype = stored_as(shape.head_dim, shape.rows.window)
        self.windows = [
            rows_in(zeros((slots, shape.window + shape.margin, width), device, dtype), shape.rows.window)
            for device in shape.devices
        ]
        self.sources = {
            layer: self._source(ratio, shape.devices[layer]) for layer, ratio in shape.sources.items()
        }
        self.history = torch.zeros(slots, shape.history_rows, dtype=torch.int64)
        self._history = self.history.numpy()  # the same memory: between steps, NumPy's calls cost less

    def bytes_at(self, tokens: int) -> int:
        return self.shape.nbytes(self.slots, tokens)

    def appended(self, slot: int) -> tuple[tuple[int, torch.Tensor], ...]:
        return tuple(
            (source.ratio, bytes_of(rows)[slot])
            for source in self.sources.values()
            for rows in (source.entries, source.index_keys)
        )

    def recent(self, slot: int, length: int) -> tuple[torch.Tensor, ...]:
        rings = [bytes_of(window)[slot] for window in self.windows]
        rings += [ring[slot] for s in self.sources.values() for ring in (s.open_kv, s.open_gate)]
        rings.append(self.history[slot])
        return tuple(ring[: min(length, len(ring))] for ring in rings)

    def extend_window(self, layer: int, segment: Segment, kv: Rows) -> Rows:
        """Store the segment's latents `[L, head_dim]`; return them behind the up to window-1 before them."""
        before, ring = min(self.shape.window - 1, segment.start), bytes_of(self.windows[layer])
        return like(kv, extend_ring(ring[segment.slot], segment.start, before, bytes_of(kv)))

    def extend_group(
        self, layer: int, segment: Segment, kv: torch.Tensor, gate: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store a source layer's projections `[L, head_dim]`; return them behind those of the group that
        was not complete."""
        source, slot = self.sources[layer], segment.slot
        if source.ratio == 1:
            return kv, gate
        held = segment.start % source.ratio
        return (
            extend_ring(source.open_kv[slot], segment.start, held, kv),
            extend_ring(source.open_gate[slot], segment.start, held, gate),
        )

    def _source(self, ratio: int, device: torch.device) -> SourceState:
        shape = self.shape
        kinds = (shape.head_dim, shape.rows.entries), (shape.index_dim, shape.rows.index_keys)
        entries, index_keys = (self._appended(ratio, dim, form, device) for dim, form in kinds)
        ring = self.slots, shape.open_rows(ratio), shape.head_dim
        return SourceState(ratio, entries, index_keys, zeros(ring, device), zeros(ring, device))

    def _appended(self, ratio: int, dim: int, form: RowFormat | None, device: torch.device) -> Rows:
        width, dtype = stored_as(dim, form)
        size = self.slots, self.capacity // ratio, width
        return rows_in(self.pages.reserve(size, slot_axis=0, ratio=ratio, device=device, dtype=dtype), form)

    def extend_history(self, segment: Segment, keys: np.ndarray) -> np.ndarray:
        """Store the segment's token keys `[L]` int64; return them behind the `history` ones before them."""
        ring, history = self._history[segment.slot], self.shape.history
        size, end = len(ring), segment.start + len(keys)
        before = min(history, segment.start)
        joined = np.empty(history + len(keys), dtype=np.int64)
        joined[: history - before] = self.shape.history_pad
        joined[history - before : history] = ring[np.arange(segment.start - before, segment.start) % size]
        joined[history:] = keys
        kept = min(size, len(keys))
        ring[np.arange(end - kept, end) % size] = keys[-kept:]
        return joined
