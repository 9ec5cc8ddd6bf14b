"""Weights beyond every cache: one run of bytes, cut into copies of one weight.

Reading memory costs the same whatever the bytes are, so one weight is made and copied; every format in turn
uses the same memory, and plain reads are timed on it too.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from quant.kernels.cpu import library
from quant.kernels.cpu.native import NativeKernels
from quant.kernels.cpu.panel_slots import ExpertSlotLayout
from quant.kernels.file_slots import FileSlotLayout
from quant.kernels.interface import ExpertWeights, Weight, matrix_shapes, three_formats

STREAMS = 4  # of plain reads, in each thread


class Arena:
    """`nbytes` of memory, and the ways to fill and to read it."""

    def __init__(self, nbytes: int, kernels: NativeKernels) -> None:
        self.bytes = torch.zeros(nbytes, dtype=torch.uint8)
        self.kernels = kernels
        self._library = library.load()
        self._level = library.LEVELS.index(kernels.level)

    def read(self, start: int, nbytes: int) -> None:
        """Read bytes and do nothing with them, as fast as the machine can."""
        at = self.bytes.data_ptr() + start
        self._library.loci_read(self._level, torch.get_num_threads(), at, nbytes, STREAMS)

    def read_rows(self, row_bytes: int, rows: torch.Tensor) -> None:
        """Read rows `[n]` int64 of `row_bytes` each, in their order."""
        self._library.loci_read_rows(
            self._level,
            torch.get_num_threads(),
            self.bytes.data_ptr(),
            row_bytes,
            rows.data_ptr(),
            len(rows),
        )

    def copies(self, weight: torch.Tensor) -> list[torch.Tensor]:
        """As many copies of a contiguous tensor as fit."""
        flat = weight.reshape(-1).view(torch.uint8)
        count = len(self.bytes) // len(flat)
        slots = self.bytes[: count * len(flat)].view(count, -1)
        slots.copy_(flat)
        return [slot.view(weight.dtype).view(weight.shape) for slot in slots]

    def matrices(self, weight: Weight) -> list[Weight]:
        """As many copies of a prepared matrix as fit."""
        if isinstance(weight, torch.Tensor):
            return list(self.copies(weight))
        return [replace(weight, codes=codes) for codes in self.copies(weight.codes)]

    def experts(self, layout: ExpertSlotLayout, most: int | None = None) -> list[ExpertWeights]:
        """As many copies of a random expert as fit, at most `most`."""
        return [layout.views(copy) for copy in self.copies(random_slot(layout))[:most]]


def random_slot(layout: ExpertSlotLayout | FileSlotLayout) -> torch.Tensor:
    """A slot with a random expert, uint8 `[nbytes]`."""
    hidden, width = layout.hidden, layout.width
    slot = torch.zeros(layout.nbytes, dtype=torch.uint8)
    w1, w3, w2 = (
        format_.encode(torch.randn(shape) / shape[1] ** 0.5)
        for format_, shape in zip(three_formats(layout.formats), matrix_shapes(hidden, width), strict=True)
    )
    layout.pack_into(slot, w1, w3, w2)
    return slot
