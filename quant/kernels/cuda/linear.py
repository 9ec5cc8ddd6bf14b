"""Triton: `x @ weight^T` for packed and bfloat16 weights, for few tokens and for many.

Few tokens: every program multiplies four rows, a thousand columns at a time, with one x and accumulates in
registers; reading the weight dominates. More tokens: tiles go through the tensor cores. Programs
that share rows of the weight are neighbours, so the GPU's memory is read once and its cache gives the rest.
Numbers are decoded to float32 and rounded to x's dtype for the tensor cores only: exact for MXFP4 and FP8,
whose values bfloat16 holds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from quant.errors import FormatError
from quant.formats.fp8 import Fp8
from quant.formats.mxfp4 import Mxfp4
from quant.kernels.cuda.decode import (
    CHUNK,
    INT4_OFFSET,
    UNIT,
    check_reachable,
    eight_columns,
    four_bit_kind,
    load_four_bit,
    load_fp8,
    load_units,
    nf4_levels,
    split_columns,
    times_factor,
)
from quant.kernels.cuda.launch import Launch
from quant.kernels.interface import Weight
from quant.packed import PackedTensor

FEW_TOKENS = 4
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


@triton.jit(do_not_specialize=["tokens"])
def four_bit_linear(
    x,
    codes,
    scales,
    levels,
    out,
    tokens,
    n,
    units,
    KIND: tl.constexpr,
    PER_SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UNITS: tl.constexpr,
    IN_PARTS: tl.constexpr,
):
    """x `[tokens, 32 * units]` -> out `[tokens, n]`; grid (blocks of n times blocks of tokens)."""
    blocks = tl.cdiv(tokens, BLOCK_M)
    rows = tl.program_id(0) // blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    block = tl.program_id(0) % blocks
    row_inside = rows < n
    if BLOCK_M == 1:
        total = times_vector(
            x + block * units * UNIT, codes, scales, levels, rows, row_inside, units,
            KIND, PER_SCALE, BLOCK_N, UNITS,
        )  # fmt: skip
        tl.store(out + block * n + rows, total.to(out.dtype.element_ty), mask=row_inside)
    else:
        token = block * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = token < tokens
        total = times_matrix(
            x, token, inside, codes, scales, levels, rows, row_inside, units,
            KIND, PER_SCALE, BLOCK_M, BLOCK_N, UNITS, IN_PARTS,
        )  # fmt: skip
        store_tile(out, total, token, inside, rows, row_inside, n)


@triton.jit(do_not_specialize=["tokens"])
def fp8_linear(
    x,
    codes,
    scales,
    out,
    tokens,
    n,
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
    """As `four_bit_linear`: x `[tokens, cols]`, weight `[n, cols]` -> out `[tokens, n]`."""
    blocks = tl.cdiv(tokens, BLOCK_M)
    rows = tl.program_id(0) // blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    block = tl.program_id(0) % blocks
    row_inside = rows < n
    if BLOCK_M == 1:
        total = fp8_times_vector(
            x + block * cols, codes, scales, rows, row_inside, cols, scale_cols,
            TILE_ROWS, TILE_COLS, POWERS, BLOCK_N, CHUNKS,
        )  # fmt: skip
        tl.store(out + block * n + rows, total.to(out.dtype.element_ty), mask=row_inside)
    else:
        token = block * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = token < tokens
        total = fp8_times_matrix(
            x, token, inside, codes, scales, rows, row_inside, cols, scale_cols,
            TILE_ROWS, TILE_COLS, POWERS, BLOCK_M, BLOCK_N, CHUNKS, IN_PARTS,
        )  # fmt: skip
        store_tile(out, total, token, inside, rows, row_inside, n)


@triton.jit(do_not_specialize=["tokens"])
def plain_linear(
    x,
    weight,
    out,
    tokens,
    n,
    cols,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    COLS: tl.constexpr,
    IN_PARTS: tl.constexpr,
):
    """As `fp8_linear` for a weight `[n, cols]` of bfloat16 and x of float32."""
    blocks = tl.cdiv(tokens, BLOCK_M)
    rows = tl.program_id(0) // blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    block = tl.program_id(0) % blocks
    row_inside = rows < n
    if BLOCK_M == 1:
        total = plain_times_vector(x + block * cols, weight, rows, row_inside, cols, BLOCK_N, COLS)
        tl.store(out + block * n + rows, total, mask=row_inside)
    else:
        token = block * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = token < tokens
        total = plain_times_matrix(
            x, token, inside, weight, rows, row_inside, cols, BLOCK_M, BLOCK_N, COLS, IN_PARTS
        )
        store_tile(out, total, token, inside, rows, row_inside, n)


@dataclass(frozen=True)
class Blocks:
    """The block of a program: `tokens` x `rows` results, `cols` columns a step, by `warps` of 32 threads.

    shares_x: experts' gate and up are computed by one pass over x, where registers hold both sums.
    """

    tokens: int
    rows: int
    cols: int
    warps: int
    shares_x: bool = False

    @classmethod
    def of(cls, tokens: int, dtype: torch.dtype) -> Blocks:
        """For `tokens` activations: the fastest measured blocks that do not spill registers."""
        if tokens <= FEW_TOKENS:
            return cls(1, 4, 1024, 4)
        if tokens <= 32:
            return cls(16 if tokens <= 16 else 32, 64, 64, 4)
        if dtype == torch.float32:
            return cls(64, 64, 32, 4)
        return cls(128, 64, 64, 8, shares_x=True) if tokens > 64 else cls(64, 64, 64, 4, shares_x=True)


def multiplies_bfloat16(device: torch.device) -> bool:
    """False in Triton's interpreter; True where kernels are compiled, if only to look at them."""
    return device.type in ("cuda", "meta")


def is_in_parts(x: torch.Tensor, weight: Weight) -> bool:
    """What kernels take as IN_PARTS; never in the interpreter, which cannot multiply bfloat16."""
    if x.dtype != torch.float32 or not multiplies_bfloat16(x.device):
        return False
    if isinstance(weight, torch.Tensor):
        return weight.dtype == torch.bfloat16
    has_powers = weight.scales is not None and weight.scales.dtype == torch.uint8
    return has_powers and isinstance(weight.format, (Mxfp4, Fp8))


def four_bit_constants(x: torch.Tensor, weight: PackedTensor, blocks: Blocks) -> dict[str, int | bool]:
    """What kernels are compiled for, given the activations' dtype and the weight's format."""
    kind = four_bit_kind(weight)
    assert kind is not None
    return {
        "KIND": kind,
        "PER_SCALE": weight.format.tile_cols // UNIT.value,
        "BLOCK_M": blocks.tokens,
        "BLOCK_N": blocks.rows,
        "UNITS": blocks.cols // UNIT.value,
        "IN_PARTS": is_in_parts(x, weight),
    }


def linear_launch(x: torch.Tensor, weight: Weight, out: torch.Tensor) -> Launch:
    """The launch that computes `x` `[tokens, cols]` times `weight` into `out` `[tokens, rows]`.

    Raises FormatError for a format that has no kernel here.
    """
    tokens, (rows, cols) = x.shape[0], weight.shape
    blocks = Blocks.of(tokens, x.dtype)
    grid = (-(-rows // blocks.rows) * -(-tokens // blocks.tokens),)
    constants: dict[str, int | bool]
    arguments: tuple[torch.Tensor | int, ...]
    if isinstance(weight, torch.Tensor):
        constants = {
            "BLOCK_M": blocks.tokens,
            "BLOCK_N": blocks.rows,
            "COLS": blocks.cols,
            "IN_PARTS": is_in_parts(x, weight),
        }
        arguments = (x, weight, out, tokens, rows, cols)
        return Launch(plain_linear, grid, arguments, constants, blocks.warps)
    check_reachable(weight)
    assert weight.scales is not None
    if isinstance(weight.format, Fp8):
        constants = {
            "TILE_ROWS": weight.format.tile_rows,
            "TILE_COLS": weight.format.tile_cols,
            "POWERS": weight.scales.dtype == torch.uint8,
            "BLOCK_M": blocks.tokens,
            "BLOCK_N": blocks.rows,
            "CHUNKS": blocks.cols // CHUNK.value,
            "IN_PARTS": is_in_parts(x, weight),
        }
        arguments = (x, weight.codes, weight.scales, out, tokens, rows, cols, weight.scales.shape[1])
        kernel = fp8_linear
    elif four_bit_kind(weight) is not None:
        constants = four_bit_constants(x, weight, blocks)
        units = cols // UNIT.value
        arguments = (x, weight.codes, weight.scales, nf4_levels(x.device), out, tokens, rows, units)
        kernel = four_bit_linear
    else:
        raise FormatError(f"{weight.format.name}: no Triton kernel supports it")
    return Launch(kernel, grid, arguments, constants, blocks.warps)
