"""Experts on a GPU: in file layout there, in panels in DRAM, repacked on the GPU when they move.

The CPU's kernels need panels, the GPU's need rows in file layout. The GPU repacks after the bytes have
arrived over its link: its memory is some forty times as fast as the link, so this costs little next to the
transfer, while the CPU is busy computing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from quant.errors import FormatError
from quant.formats.four_bit import FourBit
from quant.formats.gguf_levels import MXFP4_BLOCKS
from quant.formats.int4 import Int4
from quant.formats.mxfp4 import MXFP4, Mxfp4
from quant.formats.nf4 import Nf4
from quant.kernels.cpu.panel_slots import ExpertSlotLayout
from quant.kernels.cpu.panels import PANEL_ROWS, TILED
from quant.kernels.file_slots import FileSlotLayout
from quant.kernels.interface import three_formats

BLOCK = 32  # columns
STRIP_BLOCKS = 4
SPAN = 4 * PANEL_ROWS  # bytes: four of each row


@dataclass(frozen=True)
class _Strips:
    """Strips of `blocks` blocks of columns, side by side in a panel of a four-bit weight.

    A strip is a header with the scales of its groups, row beside row, and 4 * blocks spans of codes.
    """

    count: int
    blocks: int
    group_blocks: int
    scale_bytes: int

    @property
    def row_bytes(self) -> tuple[int, int]:
        """Bytes of a row's codes and scales in all of them."""
        return self.count * self.blocks * 16, self.count * self.header_bytes // PANEL_ROWS

    @property
    def header_bytes(self) -> int:
        return PANEL_ROWS * (self.blocks // self.group_blocks) * self.scale_bytes

    @property
    def nbytes(self) -> int:
        return self.header_bytes + 4 * self.blocks * SPAN

    def to_rows(self, panels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """panels `[n, count * nbytes]` -> scales and codes of each row, `[n * 32, bytes]` each."""
        strips = panels.reshape(-1, self.count, self.nbytes)
        header = strips[..., : self.header_bytes].reshape(
            -1, self.count, self.blocks // self.group_blocks, PANEL_ROWS, self.scale_bytes
        )
        scales = header.permute(0, 3, 1, 2, 4).reshape(len(strips) * PANEL_ROWS, -1)
        codes = strips[..., self.header_bytes :].reshape(-1, self.count, 4 * self.blocks, PANEL_ROWS, 4)
        return scales, codes.permute(0, 3, 1, 2, 4).reshape(len(strips) * PANEL_ROWS, -1)

    def to_panels(self, scales: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """The inverse of `to_rows`."""
        groups = self.blocks // self.group_blocks
        header = scales.reshape(-1, PANEL_ROWS, self.count, groups, self.scale_bytes).permute(0, 2, 3, 1, 4)
        spans = codes.reshape(-1, PANEL_ROWS, self.count, 4 * self.blocks, 4).permute(0, 2, 3, 1, 4)
        whole = torch.cat((header.flatten(2), spans.flatten(2)), dim=2)  # [n, count, nbytes]
        return whole.flatten(1)


@dataclass(frozen=True)
class GpuSlotLayout(FileSlotLayout):
    """Slots on a GPU: file layout, with conversion from and to slots of panels. Four-bit formats only.

    GGUF's MXFP4 has the panels of MXFP4 and is MXFP4 here: the same numbers.
    """

    def __post_init__(self) -> None:
        formats = tuple(MXFP4 if f is MXFP4_BLOCKS else f for f in three_formats(self.formats))
        object.__setattr__(self, "formats", formats)
        super().__post_init__()
        names = sorted({format_.name for format_ in self.three})
        if type(self.three[0]) not in (Mxfp4, Nf4, Int4) or len(names) > 1:
            raise FormatError(
                f"{', '.join(names)}: experts in this format cannot be placed on a GPU yet; mxfp4, nf4 and "
                "int4 can, the same for all matrices (`loci quantize` converts)"
            )

    @property
    def format(self) -> FourBit:
        """That of all matrices."""
        assert isinstance(self.three[0], FourBit)
        return self.three[0]

    def from_panels(self, slot: torch.Tensor, panels: torch.Tensor) -> None:
        """Fill `slot` from a slot of panels, both on one device."""
        for weight, source in zip(self.views(slot).matrices, self._panels(panels), strict=True):
            rows, cols = weight.shape
            assert weight.scales is not None
            sizes = [strips.count * strips.nbytes for strips in self._strips(cols)]
            parts = [
                strips.to_rows(part)
                for strips, part in zip(self._strips(cols), torch.split(source, sizes, dim=1), strict=True)
            ]
            words = torch.cat([codes for _, codes in parts], dim=1)[:rows].view(torch.int32)
            weight.codes.copy_(self._to_file(words).view(torch.uint8))
            scales = torch.cat([scales for scales, _ in parts], dim=1)[:rows]
            weight.scales.copy_(scales.view(weight.scales.dtype))

    def to_panels(self, slot: torch.Tensor, panels: torch.Tensor) -> None:
        """Fill a slot of panels from `slot`, both on one device."""
        for weight, target in zip(self.views(slot).matrices, self._panels(panels), strict=True):
            rows, cols = weight.shape
            assert weight.scales is not None
            missing = (0, 0, 0, -rows % PANEL_ROWS)  # zero rows that pad the last panel
            codes = F.pad(self._to_panel(weight.codes.view(torch.int32)).view(torch.uint8), missing)
            scales = F.pad(weight.scales.view(torch.uint8), missing)
            parts = []
            for strips in self._strips(cols):
                code_bytes, scale_bytes = strips.row_bytes
                parts.append(strips.to_panels(scales[:, :scale_bytes], codes[:, :code_bytes]))
                codes, scales = codes[:, code_bytes:], scales[:, scale_bytes:]
            target.copy_(torch.cat(parts, dim=1))

    def _strips(self, cols: int) -> list[_Strips]:
        """The whole strips of a panel, and the shorter one at its end, where there is one."""
        blocks, group = cols // BLOCK, self.format.tile_cols // BLOCK
        size = self.format.scale_dtype.itemsize
        whole, rest = divmod(blocks, STRIP_BLOCKS)
        found = [_Strips(whole, STRIP_BLOCKS, group, size), _Strips(1, rest, group, size)]
        return [strips for strips in found if strips.count and strips.blocks]

    def _panels(self, slot: torch.Tensor) -> list[torch.Tensor]:
        """The panels of each weight in a slot of panels, `[n, bytes of a panel]`."""
        weights = ExpertSlotLayout(self.hidden, self.width, self.format).views(slot).matrices
        tiled = TILED[self.format.name]
        return [w.codes.view(-1, PANEL_ROWS * tiled.row_bytes(w.shape[1])) for w in weights]

    def _to_panel(self, words: torch.Tensor) -> torch.Tensor:
        """Eight columns are the nibbles of a word, from low to high: 0 1 2 3 4 5 6 7 to 0 4 1 5 2 6 3 7."""
        words = words if self._even_is_low else _swap_nibbles(words)
        return _swap(_swap(words, 8, 0x0000FF00), 4, 0x00F000F0)

    def _to_file(self, words: torch.Tensor) -> torch.Tensor:
        """The inverse of `_to_panel`."""
        words = _swap(_swap(words, 4, 0x00F000F0), 8, 0x0000FF00)
        return words if self._even_is_low else _swap_nibbles(words)

    @property
    def _even_is_low(self) -> bool:
        return self.format.even_is_low


def _swap(words: torch.Tensor, distance: int, mask: int) -> torch.Tensor:
    """Exchange the bits under `mask` with those `distance` higher. Signs shift in above the mask only."""
    moved = (words >> distance ^ words) & mask
    return words ^ moved ^ moved << distance


def _swap_nibbles(words: torch.Tensor) -> torch.Tensor:
    return (words & 0x0F0F0F0F) << 4 | words >> 4 & 0x0F0F0F0F
