"""Triton: `x @ weight^T` for packed weights, for a few tokens and for many.

A few tokens: every program multiplies four rows, a thousand columns at a time, with each x and adds up in
registers; the time is that of reading the weight. More tokens: tiles go through the tensor cores, and the
weight is still read once for each block of tokens. Numbers are decoded to float32 and rounded to x's dtype
for the tensor cores only: exact for MXFP4 and FP8, whose values bfloat16 holds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from quant.errors import FormatError
from quant.fp8 import Fp8
from quant.kernels.triton_decode import (
    CHUNK,
    INT4_OFFSET,
    check_reachable,
    eight_columns,
    four_bit_kind,
    load_four_bit,
    load_fp8,
    load_scales,
    load_words,
    nf4_levels,
    split_columns,
    times_factor,
)
from quant.kernels.triton_launch import Launch
from quant.mxfp4 import Mxfp4
from quant.packed import PackedTensor

FEW_TOKENS = 4
# How tensor cores multiply float32 with what bfloat16 cannot hold: three passes of TF32, close to float32.
PRECISION: tl.constexpr = tl.constexpr("tf32x3")


@triton.jit
def times_vectors(
    x,
    x_rows,
    x_inside,
    codes,
    scales,
    levels,
    rows,
    row_inside,
    groups,
    KIND: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """As `times_four_bit`, for a few rows of x: in registers, without tensor cores."""
    total = tl.zeros([BLOCK_M, BLOCK_N, GROUPS], tl.float32)
    cols = groups * (2 * HALF)
    for first in range(0, groups, GROUPS):
        group = first + tl.arange(0, GROUPS)
        at = rows[:, None] * groups + group[None, :]
        inside = row_inside[:, None] & (group < groups)[None, :]
        words = load_words(codes, at, inside, HALF)
        scale, offset = load_scales(scales, at, inside, KIND)
        col = first * (2 * HALF) + tl.arange(0, GROUPS * 2 * HALF)
        x_at = x + x_rows[:, None] * cols + col[None, :]
        values = tl.load(x_at, mask=x_inside[:, None] & (col < cols)[None, :], other=0.0).to(tl.float32)
        xa, xb, xc, xd, xe, xf, xg, xh = split_columns(values, GROUPS, HALF // 4)
        a, b, c, d, e, f, g, h = eight_columns(words, levels, KIND)
        part = a[None, :, :, :] * xa
        part += b[None, :, :, :] * xb
        part += c[None, :, :, :] * xc
        part += d[None, :, :, :] * xd
        part += e[None, :, :, :] * xe
        part += f[None, :, :, :] * xf
        part += g[None, :, :, :] * xg
        part += h[None, :, :, :] * xh
        total += times_factor(tl.sum(part, axis=3), KIND) * scale[None, :, :]
        if KIND == INT4_OFFSET:
            total += tl.sum(xa + xb + xc + xd + xe + xf + xg + xh, axis=3) * offset[None, :, :]
    return tl.sum(total, axis=2)


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
def times_matrix(
    x,
    x_rows,
    x_inside,
    codes,
    scales,
    levels,
    rows,
    row_inside,
    groups,
    KIND: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUPS: tl.constexpr,
    IN_PARTS: tl.constexpr,
):
    """As `times_four_bit`, for many rows of x: by tensor cores."""
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    cols = groups * (2 * HALF)
    for first in range(0, groups, GROUPS):
        group = first + tl.arange(0, GROUPS)
        weight = load_four_bit(codes, scales, levels, rows, row_inside, group, groups, KIND, HALF)
        weight = tl.trans(tl.reshape(weight, (BLOCK_N, GROUPS * 2 * HALF)))
        col = first * (2 * HALF) + tl.arange(0, GROUPS * 2 * HALF)
        x_at = x + x_rows[:, None] * cols + col[None, :]
        x_tile = tl.load(x_at, mask=x_inside[:, None] & (col < cols)[None, :], other=0.0)
        total = times_tile(x_tile, weight, total, IN_PARTS)
    return total


@triton.jit
def times_four_bit(
    x,
    x_rows,
    x_inside,
    codes,
    scales,
    levels,
    rows,
    row_inside,
    groups,
    KIND: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUPS: tl.constexpr,
    IN_PARTS: tl.constexpr,
):
    """Rows x_rows of the matrix at x times rows of a four-bit weight: float32 `[BLOCK_M, BLOCK_N]`."""
    if BLOCK_M < 16:  # less than a tile of the tensor cores
        return times_vectors(
            x, x_rows, x_inside, codes, scales, levels, rows, row_inside, groups,
            KIND, HALF, BLOCK_M, BLOCK_N, GROUPS,
        )  # fmt: skip
    else:
        return times_matrix(
            x, x_rows, x_inside, codes, scales, levels, rows, row_inside, groups,
            KIND, HALF, BLOCK_M, BLOCK_N, GROUPS, IN_PARTS,
        )  # fmt: skip


@triton.jit
def four_bit_linear(
    x,
    codes,
    scales,
    levels,
    out,
    tokens,
    n,
    groups,
    KIND: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUPS: tl.constexpr,
    IN_PARTS: tl.constexpr,
):
    """x `[tokens, 2 * HALF * groups]` -> out `[tokens, n]`; grid (blocks of n, blocks of tokens)."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_inside = rows < n
    token = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = token < tokens
    total = times_four_bit(
        x, token, inside, codes, scales, levels, rows, row_inside, groups,
        KIND, HALF, BLOCK_M, BLOCK_N, GROUPS, IN_PARTS,
    )  # fmt: skip
    at = out + token[:, None] * n + rows[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=inside[:, None] & row_inside[None, :])


@triton.jit
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
    """x `[tokens, cols]`, weight `[n, cols]` -> out `[tokens, n]`; grid (blocks of n, blocks of tokens)."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_inside = rows < n
    token = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = token < tokens
    sums = tl.zeros([BLOCK_M, BLOCK_N, CHUNKS if BLOCK_M < 16 else 1], tl.float32)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, tl.cdiv(cols, CHUNK), CHUNKS):
        chunk = first + tl.arange(0, CHUNKS)
        weight, scale = load_fp8(
            codes, scales, rows, row_inside, chunk, cols, scale_cols, TILE_ROWS, TILE_COLS, POWERS
        )
        if BLOCK_M < 16:
            col = chunk[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
            x_at = x + token[:, None, None] * cols + col[None, :, :]
            x_inside = inside[:, None, None] & (col < cols)[None, :, :]
            x_tile = tl.load(x_at, mask=x_inside, other=0.0).to(tl.float32)
            part = tl.sum(weight[None, :, :, :] * x_tile[:, None, :, :], axis=3)
            sums += part * scale[None, :, :]
        else:
            weight = tl.reshape(weight * scale[:, :, None], (BLOCK_N, CHUNKS * CHUNK))
            col = first * CHUNK + tl.arange(0, CHUNKS * CHUNK)
            x_at = x + token[:, None] * cols + col[None, :]
            x_tile = tl.load(x_at, mask=inside[:, None] & (col < cols)[None, :], other=0.0)
            total = times_tile(x_tile, tl.trans(weight), total, IN_PARTS)
    if BLOCK_M < 16:
        total = tl.sum(sums, axis=2)
    at = out + token[:, None] * n + rows[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=inside[:, None] & row_inside[None, :])


@dataclass(frozen=True)
class Blocks:
    """What a program computes: `tokens` x `rows` results, `cols` columns a step, by `warps` of 32 threads."""

    tokens: int
    rows: int
    cols: int
    warps: int

    @classmethod
    def of(cls, tokens: int, dtype: torch.dtype) -> Blocks:
        """For `tokens` activations of `dtype`: the fastest that were measured of those without spilling."""
        if tokens <= FEW_TOKENS:
            return cls(1 << (tokens - 1).bit_length(), 4, 1024, 4)
        if tokens <= 16:
            return cls(16, 64, 64, 4)
        return cls(32, 64, 64, 4) if tokens <= 32 or dtype == torch.float32 else cls(64, 128, 64, 8)


def is_in_parts(x: torch.Tensor, weight: PackedTensor) -> bool:
    """What kernels take as IN_PARTS; never in the interpreter, which cannot multiply bfloat16."""
    assert weight.scales is not None
    is_exact = isinstance(weight.format, (Mxfp4, Fp8)) and weight.scales.dtype == torch.uint8
    return is_exact and x.dtype == torch.float32 and x.device.type != "cpu"


def four_bit_constants(x: torch.Tensor, weight: PackedTensor, blocks: Blocks) -> dict[str, int | bool]:
    """What kernels are compiled for, given the activations' dtype and the weight's format."""
    kind = four_bit_kind(weight)
    assert kind is not None
    group = weight.format.tile_cols
    return {
        "KIND": kind,
        "HALF": group // 2,
        "BLOCK_M": blocks.tokens,
        "BLOCK_N": blocks.rows,
        "GROUPS": max(1, blocks.cols // group),
        "IN_PARTS": is_in_parts(x, weight),
    }


def linear_launch(x: torch.Tensor, weight: PackedTensor, out: torch.Tensor) -> Launch:
    """The launch that computes `x` `[tokens, cols]` times `weight` into `out` `[tokens, rows]`.

    Raises FormatError for a format that has no kernel here.
    """
    tokens, (rows, cols) = x.shape[0], weight.shape
    check_reachable(weight)
    assert weight.scales is not None
    blocks = Blocks.of(tokens, x.dtype)
    arguments: tuple[torch.Tensor | int, ...]
    if isinstance(weight.format, Fp8):
        constants: dict[str, int | bool] = {
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
        groups = cols // weight.format.tile_cols
        arguments = (x, weight.codes, weight.scales, nf4_levels(x.device), out, tokens, rows, groups)
        kernel = four_bit_linear
    else:
        raise FormatError(f"{weight.format.name}: no Triton kernel multiplies with it")
    grid = (-(-rows // blocks.rows), -(-tokens // blocks.tokens))
    return Launch(kernel, grid, arguments, constants, blocks.warps)
