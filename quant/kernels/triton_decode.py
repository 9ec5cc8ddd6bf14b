"""Packed weights to numbers in registers: the part that every Triton kernel shares.

Codes go from a byte to two floats by moving bits, never through a dequantised copy in memory. Tiles
of four-bit weights are `[BLOCK_N, GROUPS, HALF]`: rows, scale blocks, bytes of a scale block; the two
values of a byte come as two tiles, for the even and the odd columns. Indices into a weight are 32-bit,
which is enough for any matrix but an Engram table.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quant.errors import FormatError
from quant.formats import Format
from quant.int4 import Int4, Int4Offset
from quant.mxfp4 import Mxfp4
from quant.nf4 import NF4_LEVELS, Nf4
from quant.packed import PackedTensor

# How tensor cores multiply float32: three passes of TF32, close to float32. bfloat16 is not affected.
PRECISION: tl.constexpr = tl.constexpr("tf32x3")

# Columns of FP8 weights that are loaded with one scale; every tile is a whole number of them wide.
CHUNK: tl.constexpr = tl.constexpr(32)

MXFP4: tl.constexpr = tl.constexpr(0)
NF4: tl.constexpr = tl.constexpr(1)
INT4: tl.constexpr = tl.constexpr(2)
INT4_OFFSET: tl.constexpr = tl.constexpr(3)
KINDS: dict[type[Format], int] = {Mxfp4: 0, Nf4: 1, Int4: 2, Int4Offset: 3}


def four_bit_kind(packed: PackedTensor) -> int | None:
    """What kernels take as KIND; None for other formats."""
    return KINDS.get(type(packed.format))


def nf4_levels(device: torch.device) -> torch.Tensor:
    """The table that kernels take as `levels`, on `device`; only NF4 reads it."""
    return NF4_LEVELS.to(device)


def check_reachable(packed: PackedTensor) -> None:
    """Raise FormatError for a matrix with more bytes than 32-bit indices reach."""
    if packed.codes.numel() >= 2**31:
        raise FormatError(f"{packed.format.name}: {list(packed.shape)} is too large for one kernel")


@triton.jit
def ue8m0(codes):
    """uint8 codes as float32 powers of two; code 0 is the subnormal 2^-127."""
    bits = codes.to(tl.int32)
    return tl.where(bits == 0, 0x00400000, bits << 23).to(tl.float32, bitcast=True)


@triton.jit
def four_bit_value(codes, levels, KIND: tl.constexpr):
    """Codes 0..15 as float32, before scales."""
    if KIND == MXFP4:
        # s e e m become the sign, the two lowest exponent bits and the highest mantissa bit of a
        # float16, which is then short of an exponent bias of 14; subnormals come out right as well.
        wide = codes.to(tl.uint16)
        bits = ((wide & 8) << 12) | ((wide & 7) << 9)
        return bits.to(tl.float16, bitcast=True).to(tl.float32) * 16384.0
    elif KIND == NF4:
        return tl.load(levels + codes.to(tl.int32))
    else:
        return codes.to(tl.float32) - 8.0


@triton.jit
def load_scales(scales, at, inside, KIND: tl.constexpr):
    """Scale and offset, float32, of the scale blocks numbered `at`."""
    if KIND == MXFP4:
        scale = ue8m0(tl.load(scales + at, mask=inside, other=127))
        return scale, tl.zeros_like(scale)
    elif KIND == INT4_OFFSET:
        scale = tl.load(scales + at * 2, mask=inside, other=0.0).to(tl.float32)
        return scale, tl.load(scales + at * 2 + 1, mask=inside, other=0.0).to(tl.float32)
    else:
        scale = tl.load(scales + at, mask=inside, other=0.0).to(tl.float32)
        return scale, tl.zeros_like(scale)


@triton.jit
def load_four_bit(
    codes,
    scales,
    levels,
    rows,
    row_inside,
    group,
    groups,
    KIND: tl.constexpr,
    HALF: tl.constexpr,
):
    """Values of the even and of the odd columns, each float32 `[BLOCK_N, GROUPS, HALF]`.

    rows `[BLOCK_N]`, group `[GROUPS]` (numbers of scale blocks within a row), groups: how many a row has.
    """
    at = rows[:, None] * groups + group[None, :]
    inside = row_inside[:, None] & (group < groups)[None, :]
    scale, offset = load_scales(scales, at, inside, KIND)
    byte_at = at[:, :, None] * HALF + tl.arange(0, HALF)[None, None, :]
    byte = tl.load(codes + byte_at, mask=inside[:, :, None], other=0)
    low = four_bit_value(byte & 15, levels, KIND) * scale[:, :, None]
    high = four_bit_value(byte >> 4, levels, KIND) * scale[:, :, None]
    if KIND == INT4_OFFSET:
        low += offset[:, :, None]
        high += offset[:, :, None]
    if KIND == NF4:
        return high, low
    return low, high


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
    """Values float32 `[BLOCK_N, CHUNKS, CHUNK]`; chunk `[CHUNKS]` numbers chunks of CHUNK columns.

    POWERS: scales are ue8m0, else float32.
    """
    tile = chunk * CHUNK // TILE_COLS
    scale_inside = row_inside[:, None] & (tile < scale_cols)[None, :]
    scale_at = (rows // TILE_ROWS)[:, None] * scale_cols + tile[None, :]
    if POWERS:
        scale = ue8m0(tl.load(scales + scale_at, mask=scale_inside, other=127))
    else:
        scale = tl.load(scales + scale_at, mask=scale_inside, other=0.0)
    col = chunk[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]  # [CHUNKS, CHUNK]
    inside = row_inside[:, None, None] & (col < cols)[None, :, :]
    code = tl.load(codes + rows[:, None, None] * cols + col[None, :, :], mask=inside, other=0)
    return code.to(tl.float8e4nv, bitcast=True).to(tl.float32) * scale[:, :, None]
