"""The state of window and compressed attention, for a fixed number of sequences of fixed capacity.

Per slot: a ring of the last `window` latents of every layer; for every kv source layer the
compressed entries, their index keys, and the projections of the group that is not yet complete;
and the last token keys that n-gram hashing looks back on. The layers' tensors are allocated once;
untouched pages of a long, unused slot cost no physical memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.model import KvCache, Segment


@dataclass(frozen=True)
class CacheShape:
    """What decides the size of a SparseCache.

    sources maps a kv source layer to its compression ratio; history is how many earlier token keys
    n-gram hashing needs, history_pad what stands before a sequence's start.
    """

    layers: int
    window: int
    head_dim: int
    index_dim: int
    sources: dict[int, int]
    history: int
    history_pad: int

    def nbytes(self, slots: int, capacity: int) -> int:
        """Bytes of a cache of this shape."""
        floats = self.layers * self.window * self.head_dim
        for ratio in self.sources.values():
            floats += (capacity // ratio) * (self.head_dim + self.index_dim)
            floats += 2 * (ratio - 1) * self.head_dim
        return slots * (4 * floats + 8 * self.history)


@dataclass(frozen=True)
class SourceState:
    """One kv source layer's compressed state; the first dimension is the slot.

    entries `[slots, capacity // ratio, head_dim]`   index_keys `[slots, capacity // ratio, index_dim]`
    open_kv, open_gate `[slots, ratio - 1, head_dim]`: projections of the unfinished group
    """

    ratio: int
    entries: torch.Tensor
    index_keys: torch.Tensor
    open_kv: torch.Tensor
    open_gate: torch.Tensor


class SparseCache(KvCache):
    """KvCache for models with sliding windows and shared compressed entries."""

    def __init__(self, shape: CacheShape, slots: int, capacity: int) -> None:
        super().__init__(slots, capacity)
        self.shape = shape
        self.windows = torch.zeros(shape.layers, slots, shape.window, shape.head_dim)
        self.sources = {
            layer: SourceState(
                ratio,
                torch.zeros(slots, capacity // ratio, shape.head_dim),
                torch.zeros(slots, capacity // ratio, shape.index_dim),
                torch.zeros(slots, ratio - 1, shape.head_dim),
                torch.zeros(slots, ratio - 1, shape.head_dim),
            )
            for layer, ratio in shape.sources.items()
        }
        self.history = torch.full((slots, shape.history), shape.history_pad, dtype=torch.int64)

    def reset(self, slot: int) -> None:
        super().reset(slot)
        self.history[slot] = self.shape.history_pad

    @property
    def nbytes(self) -> int:
        return self.shape.nbytes(self.slots, self.capacity)

    def appended(self, slot: int) -> tuple[tuple[int, torch.Tensor], ...]:
        return tuple(
            (source.ratio, rows[slot])
            for source in self.sources.values()
            for rows in (source.entries, source.index_keys)
        )

    def recent(self, slot: int, length: int) -> tuple[torch.Tensor, ...]:
        unfinished = [
            rows[slot, : length % source.ratio]
            for source in self.sources.values()
            for rows in (source.open_kv, source.open_gate)
        ]
        window = self.windows[:, slot, : min(length, self.shape.window)]
        return window, *unfinished, self.history[slot]

    def extend_window(self, layer: int, segment: Segment, kv: torch.Tensor) -> torch.Tensor:
        """Store the segment's latents `[L, head_dim]`; return them behind the up to window-1 before them."""
        window = self.shape.window
        ring = self.windows[layer, segment.slot]
        before = min(window - 1, segment.start)
        earlier = torch.arange(segment.start - before, segment.start) % window
        joined = torch.cat((ring[earlier], kv))
        kept = min(window, segment.length)
        stop = segment.start + segment.length
        ring[torch.arange(stop - kept, stop) % window] = kv[-kept:]
        return joined

    def extend_history(self, segment: Segment, keys: torch.Tensor) -> torch.Tensor:
        """Store the segment's token keys `[L]`; return them behind the `history` ones before them."""
        joined = torch.cat((self.history[segment.slot], keys))
        if self.shape.history:
            self.history[segment.slot] = joined[-self.shape.history :]
        return joined
