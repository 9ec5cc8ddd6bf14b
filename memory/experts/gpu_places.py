"""Where a GPU's experts are, as the GPU itself looks them up: a table in its memory that changes between
steps only."""

from __future__ import annotations

import torch

from memory.experts.slot_table import Key, SlotEntry, SlotTable
from quant.kernels.cuda.step_experts import SlotsOnGpu


class GpuPlaces:
    """The experts of a slot table on a GPU. Used by one thread at a time.

    `publish` brings what kernels read up to date.
    """

    def __init__(self, table: SlotTable, layers: int, experts: int) -> None:
        self._places = torch.full((layers, experts), -1, dtype=torch.int64)
        self._numbers = self._places.numpy()  # the same memory
        self._coming: dict[Key, SlotEntry] = {}
        self._is_new = True
        self._table = table
        device = table.tier.device
        self._on_gpu = self._places.to(device)
        for layer, entries in enumerate(table.by_layer):
            for expert, entry in entries.items():
                self.put((layer, expert), entry)
        self.publish()

    def slots(self, layer: int) -> SlotsOnGpu:
        """What kernels need to compute a layer's experts."""
        first = self._table.arena.slot(0)
        sample = self._table.layouts[layer].views(first)
        return SlotsOnGpu(first, self._on_gpu, sample, first.data_ptr())

    def put(self, key: Key, entry: SlotEntry) -> None:
        """An expert has a slot; `publish` says when its bytes are there."""
        self._coming[key] = entry

    def remove(self, key: Key) -> None:
        """An expert has left its slot, which may be overwritten: so not while a step runs."""
        self._coming.pop(key, None)
        self._numbers[key[0], key[1]] = -1
        self._is_new = True

    def publish(self) -> None:
        """Between two steps: tell the GPU what has arrived and what has left."""
        for key, entry in list(self._coming.items()):
            if entry.is_moving:
                continue
            del self._coming[key]
            if entry.ticket is None or not entry.ticket.has_failed:
                self._numbers[key[0], key[1]] = self._table.arena.place(entry.slot)
                self._is_new = True
        if self._is_new:
            self._on_gpu.copy_(self._places)
            self._is_new = False

    def holds(self, layer: int, expert: int) -> bool:
        """Whether the GPU knows of an expert."""
        return bool(self._numbers[layer, expert] >= 0)
