"""Pieces of Triton's products: rows of x times rows of a weight, decoded as they are read.

For one x, sums stay in registers; for a block of several, tiles go through the tensor cores. Numbers are
decoded to float32 and rounded to x's dtype for the tensor cores only: exact for MXFP4 and FP8, whose values
bfloat16 holds.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quant.kernels.cuda.decode import (
    CHUNK,
    INT4_OFFSET,
    UNIT,
    eight_columns,
    load_four_bit,
    load_fp8,
    load_units,
    split_columns,
    times_factor,
)

# How tensor cores multiply float32 with what bfloat16 cannot hold: three passes of TF32, close to float32.
PRECISION: tl.constexpr = tl.constexpr("tf32x3")


@triton.jit
def times_vector(
    x,
    codes,
    scales,
    levels,
    rows,
    row_inside,
    units,
    KIND: tl.constexpr,
    PER_SCALE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UNITS: tl.constexpr,
):
    """Rows of a four-bit weight times the vector at x: float32 `[BLOCK_N]`."""
    total = tl.zeros([BLOCK_N, UNITS], tl.float32)
    for first in range(0, units, UNITS):
        unit = first + tl.arange(0, UNITS)
        words, scale, offset = load_units(codes, scales, rows, row_inside, unit, units, KIND, PER_SCALE)
        col = first * UNIT + tl.arange(0, UNITS * UNIT)
        values = tl.load(x + col, mask=col < units * UNIT, other=0.0).to(tl.float32)
        xa, xb, xc, xd, xe, xf, xg, xh = split_columns(values, UNITS)
        a, b, c, d, e, f, g, h = eight_columns(words, levels, KIND)
        part = a * xa[None, :, :]
        part += b * xb[None, :, :]
        part += c * xc[None, :, :]
        part += d * xd[None, :, :]
        part += e * xe[None, :, :]
        part += f * xf[None, :, :]
        part += g * xg[None, :, :]
        part += h * xh[None, :, :]
        total += times_factor(tl.sum(part, axis=2), KIND) * scale
        if KIND == INT4_OFFSET:
            total += tl.sum(xa + xb + xc + xd + xe + xf + xg + xh, axis=1)[None, :] * offset
    return tl.sum(total, axis=1)


@triton.jit
def upper_half(values):
    """float32 values cut to the eight bits that bfloat16 has, as bfloat16, and what is left of them."""
    bits = values.to(tl.int32, bitcast=True)
    left = values - (bits & -0x10000).to(tl.float32, bitcast=True)
    return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True), left


@triton.jit
def times_tile(x, weight, total, IN_PARTS: tl.constexpr):
    """total + x `[BLOCK_M, cols]` times weight `[cols, BLOCK_N]` float32, by tensor cores.

    IN_PARTS: x is float32 and bfloat16 holds the weight. x is then the sum of three bfloat16, and their
    products are exact. Tensor cores cut sums instead of rounding them, so the total is kept outside them.
    """
    if IN_PARTS:
        exact = weight.to(tl.bfloat16)
        high, left = upper_half(x)
        middle, left = upper_half(left)
        low, left = upper_half(left)
        part = tl.dot(low, exact)
        part = tl.dot(middle, exact, part)
        return total + tl.dot(high, exact, part)
    else:
        return tl.dot(x, weight.to(x.dtype), total, input_precision=PRECISION)


@triton.jit
def load_tile(x, x_rows, x_inside, col, cols):
    """Columns col of rows x_rows of the matrix `[..., cols]` at x; zeros outside."""
    x_at = x + x_rows[:, None] * cols + col[None, :]
    return tl.load(x_at, mask=x_inside[:, None] & (col < cols)[None, :], other=0.0)


@triton.jit
def store_tile(out, total, token, inside, rows, row_inside, n):
    """total `[BLOCK_M, BLOCK_N]` to rows token and columns rows of the matrix `[..., n]` at out."""
    at = out + token[:, None] * n + rows[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=inside[:, None] & row_inside[None, :])


@triton.jit
def times_matrix(
    x,
    x_rows,
    x_inside,
    codes,
    scales,
    levels,
    rows,
    row_inside,
    units,
    KIND: tl.constexpr,
    PER_SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UNITS: tl.constexpr,
    IN_PARTS: tl.constexpr,
):
    """Rows x_rows of the matrix at x times rows of a four-bit weight: float32 `[BLOCK_M, BLOCK_N]`."""
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    cols = units * UNIT
    for first in range(0, units, UNITS):
        unit = first + tl.arange(0, UNITS)
        weight = load_four_bit(codes, scales, levels, rows, row_inside, unit, units, KIND, PER_SCALE)
        weight = tl.trans(tl.reshape(weight, (BLOCK_N, UNITS * UNIT)))
        col = first * UNIT + tl.arange(0, UNITS * UNIT)
        total = times_tile(load_tile(x, x_rows, x_inside, col, cols), weight, total, IN_PARTS)
    return total


@triton.jit
def times_two_matrices(
    x,
    x_rows,
    x_inside,
    first_codes,
    first_scales,
    second_codes,
    second_scales,
    levels,
    rows,
    row_inside,
    units,
    KIND: tl.constexpr,
    PER_SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UNITS: tl.constexpr,
    IN_PARTS: tl.constexpr,
):
    """As `times_matrix` for the same rows of two weights, by one pass over x."""
    one = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    two = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    cols = units * UNIT
    for first in range(0, units, UNITS):
        unit = first + tl.arange(0, UNITS)
        col = first * UNIT + tl.arange(0, UNITS * UNIT)
        x_tile = load_tile(x, x_rows, x_inside, col, cols)
        weight = load_four_bit(
            first_codes, first_scales, levels, rows, row_inside, unit, units, KIND, PER_SCALE
        )
        one = times_tile(x_tile, tl.trans(tl.reshape(weight, (BLOCK_N, UNITS * UNIT))), one, IN_PARTS)
        weight = load_four_bit(
            second_codes, second_scales, levels, rows, row_inside, unit, units, KIND, PER_SCALE
        )
        two = times_tile(x_tile, tl.trans(tl.reshape(weight, (BLOCK_N, UNITS * UNIT))), two, IN_PARTS)
    return one, two


@triton.jit
def fp8_times_vector(
    x,
    codes,
    scales,
    rows,
    row_inside,
    cols,
    scale_cols,
    TILE_ROWS: tl.constexpr,
    TILE_COLS: tl.constexpr,
    POWERS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """As `times_vector` for an FP8 weight."""
    sums = tl.zeros([BLOCK_N, CHUNKS], tl.float32)
    for first in range(0, tl.cdiv(cols, CHUNK), CHUNKS):
        chunk = first + tl.arange(0, CHUNKS)
        weight, scale = load_fp8(
            codes, scales, rows, row_inside, chunk, cols, scale_cols, TILE_ROWS, TILE_COLS, POWERS
        )
        col = chunk[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
        values = tl.load(x + col, mask=col < cols, other=0.0).to(tl.float32)
        sums += tl.sum(weight * values[None, :, :], axis=2) * scale
    return tl.sum(sums, axis=1)


@triton.jit
def fp8_times_matrix(
    x,
    x_rows,
    x_inside,
    codes,
    scales,
    rows,
    row_inside,
    cols,
    scale_cols,
    TILE_ROWS: tl.constexpr,
    TILE_COLS: tl.constexpr,
    POWERS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNKS: tl.constexpr,
    IN_PARTS: tl.constexpr,
):
    """As `times_matrix` for an FP8 weight."""
    product = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, tl.cdiv(cols, CHUNK), CHUNKS):
        chunk = first + tl.arange(0, CHUNKS)
        weight, scale = load_fp8(
            codes, scales, rows, row_inside, chunk, cols, scale_cols, TILE_ROWS, TILE_COLS, POWERS
        )
        weight = tl.reshape(weight * scale[:, :, None], (BLOCK_N, CHUNKS * CHUNK))
        col = first * CHUNK + tl.arange(0, CHUNKS * CHUNK)
        x_tile = load_tile(x, x_rows, x_inside, col, cols)
        product = times_tile(x_tile, tl.trans(weight), product, IN_PARTS)
    return product


@triton.jit
def plain_times_vector(x, weight, rows, row_inside, cols, BLOCK_N: tl.constexpr, COLS: tl.constexpr):
    """As `times_vector` for a weight of floats."""
    sums = tl.zeros([BLOCK_N, COLS], tl.float32)
    for first in range(0, cols, COLS):
        col = first + tl.arange(0, COLS)
        part = load_tile(weight, rows, row_inside, col, cols)
        values = tl.load(x + col, mask=col < cols, other=0.0)
        sums += part.to(tl.float32) * values[None, :]
    return tl.sum(sums, axis=1)


@triton.jit
def plain_times_matrix(
    x,
    x_rows,
    x_inside,
    weight,
    rows,
    row_inside,
    cols,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    COLS: tl.constexpr,
    IN_PARTS: tl.constexpr,
):
    """As `times_matrix` for a weight of floats."""
    product = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, cols, COLS):
        col = first + tl.arange(0, COLS)
        part = load_tile(weight, rows, row_inside, col, cols).to(tl.float32)
        x_tile = load_tile(x, x_rows, x_inside, col, cols)
        product = times_tile(x_tile, tl.trans(part), product, IN_PARTS)
    return product
