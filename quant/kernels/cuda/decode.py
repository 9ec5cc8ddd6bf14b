"""Decoding packed weights in registers: shared by every Triton kernel.

Codes are converted from memory words to floats by bit manipulation, never through a dequantised copy in
memory. A thread
loads four words at once; the eight four-bit codes of a word become eight tensors, one for each of its
columns, so a product needs no shuffling. Tiles of four-bit weights are `[BLOCK_N, UNITS, WORDS]`: rows, units
of 32 columns, words of a unit. Scales are applied to sums over a unit where there are such sums. Indices into
a weight are 32-bit, which is enough for any matrix but an Engram table.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from quant.errors import FormatError
from quant.formats.int4 import Int4, Int4Offset
from quant.formats.mxfp4 import Mxfp4
from quant.formats.nf4 import NF4_LEVELS, Nf4
from quant.packed import Format, PackedTensor

# Columns of FP8 weights that a thread loads with one scale; every tile is a whole number of them wide.
CHUNK: tl.constexpr = tl.constexpr(16)

MXFP4: tl.constexpr = tl.constexpr(0)
NF4: tl.constexpr = tl.constexpr(1)
INT4: tl.constexpr = tl.constexpr(2)
INT4_OFFSET: tl.constexpr = tl.constexpr(3)
KINDS: dict[type[Format], int] = {Mxfp4: 0, Nf4: 1, Int4: 2, Int4Offset: 3}

WORD_BYTES = 4
# Columns of four-bit weights that are loaded with one scale, by one thread; every scale covers some of them.
UNIT: tl.constexpr = tl.constexpr(32)
WORDS: tl.constexpr = tl.constexpr(4)


def four_bit_kind(packed: PackedTensor) -> int | None:
    """What kernels take as KIND; None for other formats."""
    return KINDS.get(type(packed.format))


@cache
def nf4_levels(device: torch.device) -> torch.Tensor:
    """The table that kernels take as `levels`, copied to `device` once; only NF4 reads it."""
    return NF4_LEVELS.to(device)


def check_reachable(packed: PackedTensor) -> None:
    """Raise FormatError for a matrix with more bytes than 32-bit indices reach, or not word-aligned."""
    if packed.codes.numel() >= 2**31:
        raise FormatError(f"{packed.format.name}: {list(packed.shape)} is too large for one kernel")
    if packed.codes.data_ptr() % WORD_BYTES:
        raise FormatError(f"{packed.format.name}: codes must begin at a multiple of {WORD_BYTES} bytes")


@triton.jit
def ue8m0(codes):
    """uint8 codes as float32 powers of two; code 0 is the subnormal 2^-127."""
    bits = codes.to(tl.int32)
    return tl.where(bits == 0, 0x00400000, bits << 23).to(tl.float32, bitcast=True)


@triton.jit
def low_half(words):
    """The lower 16 bits of words, which are a float16, as float32."""
    return words.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def high_half(words):
    """The upper 16 bits of words, which are a float16, as float32."""
    return (words >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def two_codes(words, levels, NUMBER: tl.constexpr, KIND: tl.constexpr):
    """Values of the codes in nibbles NUMBER and NUMBER + 4 of words, but for FACTOR and scales."""
    if KIND == MXFP4:
        # s e e m become the sign, the two lowest exponent bits and the highest mantissa bit of a
        # float16, which is then short of an exponent bias of 14; subnormals come out right as well.
        magnitudes = words << (9 - 4 * NUMBER) if NUMBER < 3 else words >> (4 * NUMBER - 9)
        signs = words << (12 - 4 * NUMBER)
        halves = (magnitudes & 0x0E000E00) | (signs & -0x7FFF8000)
        return low_half(halves), high_half(halves)
    elif KIND == NF4:
        low = tl.load(levels + ((words >> (4 * NUMBER)) & 15))
        return low, tl.load(levels + ((words >> (4 * NUMBER + 16)) & 15))
    else:
        # Below the mantissa of the float16 1024 a code c gives 1024 + c.
        halves = ((words >> (4 * NUMBER)) & 0x000F000F) | 0x64006400
        return low_half(halves) - 1032.0, high_half(halves) - 1032.0


@triton.jit
def eight_columns(words, levels, KIND: tl.constexpr):
    """Values of the eight columns of each word, in order, float32, but for `times_factor` and scales."""
    a, e = two_codes(words, levels, 0, KIND)
    b, f = two_codes(words, levels, 1, KIND)
    c, g = two_codes(words, levels, 2, KIND)
    d, h = two_codes(words, levels, 3, KIND)
    if KIND == NF4:  # the upper nibble of a byte is the column before the lower's
        return b, a, d, c, f, e, h, g
    return a, b, c, d, e, f, g, h


@triton.jit
def times_factor(values, KIND: tl.constexpr):
    """The factor that `eight_columns` leaves out."""
    if KIND == MXFP4:
        return values * 16384.0
    return values


@triton.jit
def load_words(codes, at, inside):
    """The words `[BLOCK_N, UNITS, WORDS]` of the units numbered `at` `[BLOCK_N, UNITS]`."""
    place = at[:, :, None] * WORDS + tl.arange(0, WORDS)[None, None, :]
    return tl.load(codes.to(tl.pointer_type(tl.int32)) + place, mask=inside[:, :, None], other=0)


@triton.jit
def load_scales(scales, at, inside, KIND: tl.constexpr):
    """Scale and offset, float32, numbered `at`."""
    if KIND == MXFP4:
        scale = ue8m0(tl.load(scales + at, mask=inside, other=0))
        return scale, tl.zeros_like(scale)
    elif KIND == INT4_OFFSET:
        scale = tl.load(scales + at * 2, mask=inside, other=0.0).to(tl.float32)
        return scale, tl.load(scales + at * 2 + 1, mask=inside, other=0.0).to(tl.float32)
    else:
        scale = tl.load(scales + at, mask=inside, other=0.0).to(tl.float32)
        return scale, tl.zeros_like(scale)


@triton.jit
def split_columns(values, UNITS: tl.constexpr):
    """values `[UNITS * 32]` -> eight tensors `[UNITS, WORDS]`, one for each column of a word."""
    even, odd = tl.split(tl.reshape(values, (UNITS, WORDS, 2, 2, 2)))
    even_low, even_high = tl.split(even)
    odd_low, odd_high = tl.split(odd)
    a, e = tl.split(even_low)
    c, g = tl.split(even_high)
    b, f = tl.split(odd_low)
    d, h = tl.split(odd_high)
    return a, b, c, d, e, f, g, h


@triton.jit
def load_units(
    codes,
    scales,
    rows,
    row_inside,
    unit,
    units,
    KIND: tl.constexpr,
    PER_SCALE: tl.constexpr,
):
    """Words `[BLOCK_N, UNITS, WORDS]` of some units, and of each its scale and offset `[BLOCK_N, UNITS]`.

    rows `[BLOCK_N]`, unit `[UNITS]` (numbers of units within a row), units: how many a row has.
    PER_SCALE: how many of them share a scale.
    """
    inside = row_inside[:, None] & (unit < units)[None, :]
    words = load_words(codes, rows[:, None] * units + unit[None, :], inside)
    scale_at = rows[:, None] * (units // PER_SCALE) + (unit // PER_SCALE)[None, :]
    scale, offset = load_scales(scales, scale_at, inside, KIND)
    return words, scale, offset


@triton.jit
def load_four_bit(
    codes,
    scales,
    levels,
    rows,
    row_inside,
    unit,
    units,
    KIND: tl.constexpr,
    PER_SCALE: tl.constexpr,
):
    """Values float32 `[BLOCK_N, UNITS, 32]`, scaled; arguments as of `load_units`."""
    words, scale, offset = load_units(codes, scales, rows, row_inside, unit, units, KIND, PER_SCALE)
    a, b, c, d, e, f, g, h = eight_columns(words, levels, KIND)
    even = tl.join(tl.join(a, e), tl.join(c, g))
    odd = tl.join(tl.join(b, f), tl.join(d, h))
    values = tl.reshape(tl.join(even, odd), (rows.shape[0], unit.shape[0], UNIT))
    values = times_factor(values, KIND) * scale[:, :, None]
    if KIND == INT4_OFFSET:
        values += offset[:, :, None]
    return values


@triton.jit
def load_fp8(
    codes,
    scales,
    rows,
    row_inside,
    chunk,
    cols,
    scale_cols,
    TILE_ROWS: tl.constexpr,
    TILE_COLS: tl.constexpr,
    POWERS: tl.constexpr,
):
    """Values float32 `[BLOCK_N, CHUNKS, CHUNK]` and the scales of chunks `[BLOCK_N, CHUNKS]`, not applied.

    chunk `[CHUNKS]` numbers chunks of CHUNK columns. POWERS: scales are ue8m0, else float32.
    """
    tile = chunk * CHUNK // TILE_COLS
    inside = row_inside[:, None] & (chunk * CHUNK < cols)[None, :]
    scale_at = (rows // TILE_ROWS)[:, None] * scale_cols + tile[None, :]
    if POWERS:
        scale = ue8m0(tl.load(scales + scale_at, mask=inside, other=127))
    else:
        scale = tl.load(scales + scale_at, mask=inside, other=0.0)
    col = chunk[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]  # [CHUNKS, CHUNK]
    place = rows[:, None, None] * cols + col[None, :, :]
    code = tl.load(codes + place, mask=row_inside[:, None, None] & (col < cols)[None, :, :], other=0)
    return code.to(tl.float8e4nv, bitcast=True).to(tl.float32), scale
