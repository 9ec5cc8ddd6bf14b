"""An expert in a slot in file layout: codes and scales of w1, w3 and w2 one after the other."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from quant.errors import FormatError
from quant.formats.fp8 import Fp8
from quant.formats.mxfp4 import MXFP4
from quant.kernels.interface import ExpertFormats, ExpertWeights, matrix_shapes, three_formats
from quant.packed import Format, PackedTensor

SCALE_ALIGNMENT = 16  # scales of several bytes are read as such


@dataclass(frozen=True)
class FileSlotLayout:
    """Slots for kernels that read experts in file layout (plain torch, Triton).

    hidden, width  the expert's dimensions
    formats        of w1, w3 and w2 in files, or one for all
    """

    hidden: int
    width: int
    formats: Format | ExpertFormats = MXFP4
    _spans: tuple[tuple[tuple[int, int], ...], ...] = field(init=False)  # of each matrix, of its parts

    def __post_init__(self) -> None:
        spans, at = [], 0
        for format_, shape in zip(self.three, self._shapes, strict=True):
            of_matrix = []
            for part_shape, dtype in format_.parts(*shape):
                stop = at + math.prod(part_shape) * dtype.itemsize
                of_matrix.append((at, stop))
                at = -(-stop // SCALE_ALIGNMENT) * SCALE_ALIGNMENT
            spans.append(tuple(of_matrix))
        object.__setattr__(self, "_spans", tuple(spans))

    @property
    def three(self) -> ExpertFormats:
        """The formats of w1, w3 and w2."""
        return three_formats(self.formats)

    @property
    def nbytes(self) -> int:
        """Bytes of a slot: those of codes and scales, each aligned."""
        return self._spans[-1][-1][1]

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
        check_fits(weight, view.format, view.shape)
        view.codes.copy_(weight.codes)
        if view.scales is not None:
            view.scales.copy_(scales_in_slot(weight))

    def views(self, slot: torch.Tensor) -> ExpertWeights:
        """The weights of the expert in `slot`."""
        weights = []
        for format_, shape, spans in zip(self.three, self._shapes, self._spans, strict=True):
            parts = [
                slot[start:stop].view(dtype).view(part_shape)
                for (start, stop), (part_shape, dtype) in zip(spans, format_.parts(*shape), strict=True)
            ]
            weights.append(PackedTensor(format_, shape, *parts))
        return ExpertWeights(*weights)

    @property
    def _shapes(self) -> tuple[tuple[int, int], ...]:
        return matrix_shapes(self.hidden, self.width)


def check_fits(weight: PackedTensor, format_: Format, shape: tuple[int, int]) -> None:
    """Raise FormatError for an expert's weight that its slot is not made for."""
    if (weight.format.name, weight.shape) != (format_.name, shape):
        raise FormatError(
            f"expert weight in {weight.format.name} of shape {list(weight.shape)}, expected {format_.name} "
            f"of {list(shape)}"
        )


def scales_in_slot(weight: PackedTensor) -> torch.Tensor:
    """A weight's scales as slots hold them: of FP8 as float32, of others as they are."""
    assert weight.scales is not None
    return weight.format.scale_values(weight.scales) if isinstance(weight.format, Fp8) else weight.scales
