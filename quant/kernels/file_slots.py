"""An expert in a slot in file layout: codes and scales of w1, w3 and w2 one after the other."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from quant.formats.mxfp4 import MXFP4
from quant.formats.stored import byte_shapes, unpack_bytes
from quant.kernels.interface import ExpertWeights
from quant.packed import Format, PackedTensor

SCALE_ALIGNMENT = 16  # scales of several bytes are read as such


@dataclass(frozen=True)
class FileSlotLayout:
    """Slots for kernels that read experts in file layout (plain torch, Triton).

    hidden, width  the expert's dimensions; `format` the experts' format in files
    """

    hidden: int
    width: int
    format: Format = MXFP4
    _spans: tuple[tuple[int, int], ...] = field(init=False)

    def __post_init__(self) -> None:
        spans, at = [], 0
        for shape in self._shapes():
            for nbytes in byte_shapes(self.format, *shape):
                spans.append((at, at + nbytes))
                at = -(-(at + nbytes) // SCALE_ALIGNMENT) * SCALE_ALIGNMENT
        object.__setattr__(self, "_spans", tuple(spans))

    @property
    def nbytes(self) -> int:
        """Bytes of a slot: those of codes and scales, each aligned."""
        return self._spans[-1][1]

    def pack_into(
        self, slot: torch.Tensor, w1: PackedTensor, w3: PackedTensor, w2: PackedTensor, threads: int = 1
    ) -> ExpertWeights:
        """Copy an expert's weights into `slot` (uint8 `[nbytes]`) and return views of them there."""
        for number, weight in enumerate((w1, w3, w2)):
            self.pack_matrix(slot, number, weight, threads)
        return self.views(slot)

    def pack_matrix(self, slot: torch.Tensor, number: int, weight: PackedTensor, threads: int = 1) -> None:
        """Copy one weight of an expert into `slot`: number 0 is w1, 1 is w3, 2 is w2."""
        view = self.views(slot).matrices[number]
        view.codes.copy_(weight.codes)
        if view.scales is not None and weight.scales is not None:
            view.scales.copy_(weight.scales)

    def views(self, slot: torch.Tensor) -> ExpertWeights:
        """The weights of the expert in `slot`."""
        parts = []
        for number, shape in enumerate(self._shapes()):
            codes, scales = (slot[start:stop] for start, stop in self._spans[2 * number : 2 * number + 2])
            parts.append(unpack_bytes(self.format, shape, codes, scales))
        return ExpertWeights(*parts)

    def _shapes(self) -> tuple[tuple[int, int], ...]:
        return (self.width, self.hidden), (self.width, self.hidden), (self.hidden, self.width)
