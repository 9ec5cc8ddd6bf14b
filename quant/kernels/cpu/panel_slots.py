"""An expert in a slot for the native kernels: the panels of w1, w3 and w2 one after the other.

What has no panels because it needs none, plain rows, lies there as it is.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from quant.errors import FormatError
from quant.formats.mxfp4 import MXFP4
from quant.formats.plain import Plain
from quant.kernels.cpu.panels import TILED, NativeWeight, Tiled, tile
from quant.kernels.file_slots import check_fits, scales_in_slot
from quant.kernels.interface import ExpertFormats, ExpertWeights, matrix_shapes, three_formats
from quant.packed import Format, PackedTensor

ALIGNMENT = 64  # bytes: a cache line


@dataclass(frozen=True)
class _Place:
    """Where a matrix lies in a slot: its codes, and behind them the scales of FP8, float32."""

    format: Tiled | Plain
    shape: tuple[int, int]
    start: int
    stop: int
    scales_stop: int

    @property
    def base(self) -> Format:
        """The format in files."""
        return self.format.base if isinstance(self.format, Tiled) else self.format

    def view(self, slot: torch.Tensor) -> NativeWeight:
        """The matrix in a slot."""
        codes, scales = slot[self.start : self.stop], None
        if isinstance(self.format, Plain):
            codes = codes.view(self.shape[0], -1)
        elif self.format.keeps_scales:
            _, (scale_shape, dtype) = self.format.base.parts(*self.shape)
            scales = slot[_aligned(self.stop) : self.scales_stop].view(dtype).view(scale_shape)
        return NativeWeight(self.format, self.shape, codes, scales)


@dataclass(frozen=True)
class ExpertSlotLayout:
    """Slots of experts in panels.

    hidden, width  the expert's dimensions
    formats        of w1, w3 and w2 in files, or one for all: with panels, or plain

    Raises FormatError for a format without panels, or for columns that end within its blocks.
    """

    hidden: int
    width: int
    formats: Format | ExpertFormats = MXFP4
    _places: tuple[_Place, ...] = field(init=False)

    def __post_init__(self) -> None:
        places, at = [], 0
        shapes = matrix_shapes(self.hidden, self.width)
        for base, shape in zip(three_formats(self.formats), shapes, strict=True):
            format_ = base if isinstance(base, Plain) else TILED.get(base.name)
            if not has_slots(base, shape[1]) or format_ is None:
                raise FormatError(f"{base.name}: there are no panels of {shape[1]} columns")
            stop = at + format_.bytes_for(*shape)
            scales_stop = stop
            if isinstance(format_, Tiled) and format_.keeps_scales:
                rows, cols = format_.base.parts(*shape)[1][0]
                scales_stop = _aligned(stop) + 4 * rows * cols
            places.append(_Place(format_, shape, at, stop, scales_stop))
            at = _aligned(scales_stop)
        object.__setattr__(self, "_places", tuple(places))

    @property
    def nbytes(self) -> int:
        """Bytes of a slot: those of codes and scales, each aligned."""
        return self._places[-1].scales_stop

    def pack_into(
        self,
        slot: torch.Tensor,
        w1: PackedTensor,
        w3: PackedTensor,
        w2: PackedTensor,
        threads: int = 1,
    ) -> ExpertWeights:
        """Repack an expert's weights into `slot` (uint8 `[nbytes]`) and return views of them there."""
        for number, weight in enumerate((w1, w3, w2)):
            self.pack_matrix(slot, number, weight, threads)
        return self.views(slot)

    def pack_matrix(self, slot: torch.Tensor, number: int, weight: PackedTensor, threads: int = 1) -> None:
        """Repack one weight of an expert into `slot`: number 0 is w1, 1 is w3, 2 is w2."""
        place = self._places[number]
        check_fits(weight, place.base, place.shape)
        view = place.view(slot)
        if isinstance(place.format, Plain):
            view.codes.copy_(weight.codes)
        else:
            tile(weight, view.codes, threads)
        if view.scales is not None:
            view.scales.copy_(scales_in_slot(weight))

    def views(self, slot: torch.Tensor) -> ExpertWeights:
        """The weights of the expert in `slot`."""
        w1, w3, w2 = (place.view(slot) for place in self._places)
        return ExpertWeights(w1, w3, w2)


def has_slots(format_: Format, cols: int) -> bool:
    """Whether matrices of so many columns in this format can lie in such slots."""
    tiled = TILED.get(format_.name)
    return isinstance(format_, Plain) or (tiled is not None and tiled.holds(cols))


def _aligned(at: int) -> int:
    return -(-at // ALIGNMENT) * ALIGNMENT
