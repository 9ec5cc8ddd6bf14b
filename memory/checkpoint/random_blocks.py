"""Random blocks of GGUF types, whose values spread as asked and never leave the range that files have.

Codes and the small scales among them are random bytes: any value of them is one. The scales of whole blocks
are drawn around what gives the spread.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from memory.checkpoint.random_files import Filling
from quant.formats.gguf import FORMATS

_EXPONENT_OF_1 = 127  # in ue8m0


@dataclass(frozen=True)
class _Halves:
    """The float16 scales of a block.

    places   where they lie in it
    factors  of each, in units of the first
    spread   of a block's values where its first scale is 1: what random codes and scales give
    """

    places: tuple[int, ...]
    factors: tuple[float, ...]
    spread: float


_HALVES = {
    # s * q - 7.5 * m of scales 0..63 and codes 0..15: a mean of zero
    "Q4_K": _Halves((0, 2), (1.0, 7.5), 257.0),
    "Q6_K": _Halves((208,), (1.0,), 73.9 * 18.5),
    "Q8_0": _Halves((0,), (1.0,), 73.9),
}
_E2M1_RMS = 2.92  # of random codes
_LEAST, _MOST = 0.5, 1.5  # of a block's scale, in units of what gives the spread
KINDS = ("F32", "MXFP4", *_HALVES)


@dataclass(frozen=True)
class RandomValues:
    """Values of a GGUF type (one of KINDS) with a mean (F32 alone, else 0) and a standard deviation."""

    dtype: str
    std: float
    mean: float = 0.0

    def nbytes(self, count: int) -> int:
        """Bytes of so many values; of whole blocks, where there are blocks."""
        return 4 * count if self.dtype == "F32" else FORMATS[self.dtype].bytes_for(1, count)

    def filling(self, name: str, offset: int, count: int) -> Filling:
        """So many values as the tensor `name`, `offset` bytes into its file."""
        unit = 4 if self.dtype == "F32" else FORMATS[self.dtype].block_bytes
        return Filling(name, offset, self.nbytes(count), self._content, unit)

    def _content(self, nbytes: int, random: np.random.Generator) -> np.ndarray:
        if self.dtype == "F32":
            values = random.standard_normal(nbytes // 4, dtype=np.float32)
            return (values * np.float32(self.std) + np.float32(self.mean)).view(np.uint8)
        blocks = random.integers(0, 256, nbytes, dtype=np.uint8)
        blocks = blocks.reshape(-1, FORMATS[self.dtype].block_bytes)
        if self.dtype == "MXFP4":
            exponent = int(np.floor(np.log2(self.std / _E2M1_RMS)))
            blocks[:, 0] = _EXPONENT_OF_1 + exponent + (blocks[:, 0] & 1)
            return blocks.reshape(-1)
        halves = _HALVES[self.dtype]
        scales = random.uniform(_LEAST, _MOST, len(blocks)) * self.std / halves.spread
        for place, factor in zip(halves.places, halves.factors, strict=True):
            blocks[:, place : place + 2] = (scales * factor).astype(np.float16)[:, None].view(np.uint8)
        return blocks.reshape(-1)
