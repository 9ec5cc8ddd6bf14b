"""An expert in a slot, as files have it: codes and scales of w1, w3 and w2 one after the other."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quant.kernels import ExpertWeights
from quant.mxfp4 import BLOCK, MXFP4
from quant.packed import PackedTensor


@dataclass(frozen=True)
class FileSlotLayout:
    """Slots for kernels that read experts in file layout (plain torch, Triton); MXFP4.

    hidden, width  the expert's dimensions
    """

    hidden: int
    width: int

    @property
    def nbytes(self) -> int:
        """Bytes of a slot: those of codes and scales."""
        return 3 * MXFP4.bytes_for(self.width, self.hidden)

    def pack_into(
        self, slot: torch.Tensor, w1: PackedTensor, w3: PackedTensor, w2: PackedTensor, threads: int = 1
    ) -> ExpertWeights:
        """Copy an expert's weights into `slot` (uint8 `[nbytes]`) and return them as they lie there."""
        expert = self.views(slot)
        for weight, view in ((w1, expert.w1), (w3, expert.w3), (w2, expert.w2)):
            assert weight.scales is not None
            assert view.scales is not None
            view.codes.copy_(weight.codes)
            view.scales.copy_(weight.scales)
        return expert

    def views(self, slot: torch.Tensor) -> ExpertWeights:
        """The weights of the expert that lies in `slot`."""
        shapes = ((self.width, self.hidden), (self.width, self.hidden), (self.hidden, self.width))
        parts = []
        at = 0
        for rows, cols in shapes:
            codes = slot[at : at + rows * cols // 2].view(rows, cols // 2)
            at += codes.numel()
            scales = slot[at : at + rows * cols // BLOCK].view(rows, cols // BLOCK)
            at += scales.numel()
            parts.append(PackedTensor(MXFP4, (rows, cols), codes, scales))
        return ExpertWeights(*parts)
