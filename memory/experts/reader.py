"""Reads experts from disk with several threads at once, straight into slots."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from memory.checkpoint.direct_reads import DirectFiles, Range, coalesce
from memory.checkpoint.entries import TensorEntry
from memory.experts.slot_table import Key
from memory.hardware.detect import usable_cores
from memory.telemetry import Telemetry
from memory.transfer import Link, Priority, Ticket
from quant.kernels.interface import ExpertFormats, SlotLayout
from quant.packed import PackedTensor

MATRICES = 3  # of an expert: w1, w3, w2
APART = tuple((number,) for number in range(MATRICES))  # each in tensors of its own
MAX_READERS = 4


def default_readers() -> int:
    """Number of readers that keeps the disk busy while others repack."""
    return min(MAX_READERS, usable_cores() + 1)


class ExpertFiles(Protocol):
    """The location and layout of experts on disk; provided by the model's family."""

    @property
    def layers(self) -> int: ...
    @property
    def experts(self) -> int: ...
    @property
    def hidden(self) -> int: ...
    @property
    def width(self) -> int: ...

    def formats(self, layer: int) -> ExpertFormats:
        """Those of w1, w3 and w2 of a layer's experts; layers may differ."""
        ...

    @property
    def together(self) -> tuple[tuple[int, ...], ...]:
        """Which matrices of an expert are read at once: those in the same tensors."""
        ...

    def entries(self, layer: int, expert: int, number: int) -> list[TensorEntry]:
        """The tensors of one matrix of an expert: number 0 is w1, 1 is w3, 2 is w2."""
        ...

    def matrix(self, layer: int, expert: int, number: int, raw: dict[str, torch.Tensor]) -> PackedTensor:
        """The matrix from the raw bytes of its tensors, by name."""
        ...


class ExpertReader:
    """Reads experts on `readers` threads, bypassing the page cache, and repacks them for the kernels.

    layouts: that of each layer's slots.

    A matrix is one request, unless it lies together with another: an expert's are read and repacked in
    parallel by as many threads, so that one missing expert alone keeps the disk busy.
    """

    def __init__(
        self, files: ExpertFiles, layouts: Sequence[SlotLayout], telemetry: Telemetry, readers: int
    ) -> None:
        self._files = files
        self._layouts = layouts
        self._direct = DirectFiles()
        self._direct.open(
            sorted(
                {
                    entry.file
                    for layer in range(files.layers)
                    for expert in range(files.experts)
                    for number in range(MATRICES)
                    for entry in files.entries(layer, expert, number)
                }
            )
        )
        self.link = Link("nvme", telemetry, workers=readers)

    def read(self, key: Key, slot: torch.Tensor, priority: Priority) -> Ticket:
        """Start reading an expert into `slot` (uint8, as large as its layer's layout at least)."""
        stop = threading.Event()
        parts = [self._part(key, numbers, slot, stop) for numbers in self._files.together]
        return self.link.submit(parts, self._layouts[key[0]].nbytes, priority, stop)

    def _part(
        self, key: Key, numbers: tuple[int, ...], slot: torch.Tensor, stop: threading.Event
    ) -> Callable[[], None]:
        layout = self._layouts[key[0]]
        ranges: list[Range] = coalesce(self._files.entries(*key, numbers[0]))

        def work() -> None:
            raw = self._direct.read(ranges, stop)
            for number in numbers:
                layout.pack_matrix(slot, number, self._files.matrix(*key, number, raw))

        return work

    def close(self) -> None:
        """Stop the threads and close the files."""
        self.link.close()
        self._direct.close()
