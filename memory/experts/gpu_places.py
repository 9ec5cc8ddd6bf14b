"""Where a GPU's experts are, as GPUs themselves look them up: tables in their memory that change between
steps only."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from memory.experts.slot_table import Key, SlotEntry, SlotTable
from quant.kernels.cuda.step_experts import SlotsOnGpu


class GpuPlaces:
    """The experts of a slot table on a GPU. Used by one thread at a time.

    `publish` brings what kernels read up to date.
    """

    def __init__(self, table: SlotTable, layers: int, experts: int) -> None:
        self._places = torch.full((layers, experts), -1, dtype=torch.int64)  # addresses of slots
        self._numbers = self._places.numpy()  # the same memory
        self._coming: dict[Key, SlotEntry] = {}
        self._is_new = True
        self._table = table
        self._on_gpu = self._places.to(table.tier.device)
        for layer, entries in enumerate(table.by_layer):
            for expert, entry in entries.items():
                self.put((layer, expert), entry)

    @property
    def tier(self) -> str:
        """Of the GPU."""
        return self._table.tier.name

    def slots(self, layer: int) -> SlotsOnGpu:
        """What kernels need to compute a layer's experts. Others' places are negative: -1 less the number of
        the GPU among the others, from 1; -1 for experts on none."""
        first = self._table.arena.slot(0)
        sample = self._table.layouts[layer].views(first)
        return SlotsOnGpu(self._on_gpu, sample, first.data_ptr())

    def put(self, key: Key, entry: SlotEntry) -> None:
        """An expert has a slot; `publish` says when its bytes are there."""
        self._coming[key] = entry

    def remove(self, key: Key) -> None:
        """An expert has left its slot, which may be overwritten: so not while a step runs."""
        self._coming.pop(key, None)
        self._numbers[key[0], key[1]] = -1
        self._is_new = True

    def holds(self, layer: int, expert: int) -> bool:
        """Whether the GPU knows of an expert."""
        return bool(self._numbers[layer, expert] >= 0)

    def _take_in(self) -> bool:
        """Note what has arrived; whether anything has changed since the last time."""
        for key, entry in list(self._coming.items()):
            if entry.is_moving:
                continue
            del self._coming[key]
            if entry.ticket is None or not entry.ticket.has_failed:
                self._numbers[key[0], key[1]] = self._table.arena.slot(entry.slot).data_ptr()
                self._is_new = True
        is_new, self._is_new = self._is_new, False
        return is_new

    def _tell(self, others: Sequence[GpuPlaces]) -> None:
        """Write the table in the GPU's memory."""
        told = self._places.clone()
        for number, other in enumerate(others, 1):
            told[(self._places < 0) & (other._places >= 0)] = -1 - number
        self._on_gpu.copy_(told)


def publish(gpus: Sequence[GpuPlaces]) -> None:
    """Between two steps: tell all GPUs what each has got and lost."""
    changes = [gpu._take_in() for gpu in gpus]
    if any(changes):
        for gpu in gpus:
            gpu._tell([other for other in gpus if other is not gpu])
