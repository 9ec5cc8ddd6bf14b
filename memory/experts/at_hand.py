"""Which experts native code can compute with at once: their addresses in DRAM, where they have arrived.

A recorded step looks experts up here and computes them without asking the store, which hears of it later.
"""

from __future__ import annotations

import torch

from memory.experts.slot_table import Key, SlotEntry, SlotTable
from quant.kernels.cpu.panels import matrix_addresses


class AtHand:
    """The experts of a slot table in host memory. Used by one thread, the engine's.

    addresses  `[layers, experts, 3]` int64: of w1, w3 and w2; 0 where they are not at hand
    busy       `[layers]` int64: transfers in flight for experts of a layer, which may have to be cancelled
    """

    def __init__(self, table: SlotTable, layers: int, experts: int) -> None:
        self.addresses = torch.zeros(layers, experts, 3, dtype=torch.int64)
        self.busy = torch.zeros(layers, dtype=torch.int64)
        self._numbers = self.addresses.numpy()  # the same memory
        self._table = table
        self._of_slot: dict[tuple[int, int], tuple[int, int, int]] = {}  # by layer and slot
        self._coming: dict[Key, SlotEntry] = {}

    def put(self, key: Key, entry: SlotEntry) -> None:
        """An expert has a slot; `publish` says when its bytes are there."""
        self._coming[key] = entry
        self.busy[key[0]] += 1

    def remove(self, key: Key) -> None:
        """An expert has left its slot."""
        self._numbers[key[0], key[1]] = 0
        if self._coming.pop(key, None) is not None:
            self.busy[key[0]] -= 1

    def publish(self) -> None:
        """Take in what has arrived."""
        for key, entry in list(self._coming.items()):
            if entry.is_moving:
                continue
            del self._coming[key]
            self.busy[key[0]] -= 1
            if entry.ticket is None or not entry.ticket.has_failed:
                self._numbers[key[0], key[1]] = self._addresses(key[0], entry)

    def _addresses(self, layer: int, entry: SlotEntry) -> tuple[int, int, int]:
        at = layer, entry.slot
        if at not in self._of_slot:
            self._of_slot[at] = matrix_addresses(self._table.weights(layer, entry))
        return self._of_slot[at]
