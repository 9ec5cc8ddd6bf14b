"""Triton: `x @ weight^T` for packed weights, for one token and for many.

One token: every program multiplies a few rows with the whole of x and adds up in registers; the time
is that of reading the weight. Several tokens: tiles go through the tensor cores, and the weight is
still read once for each block of tokens. Numbers are decoded to float32 and rounded to x's dtype for
the tensor cores only: exact for MXFP4 and FP8, whose values bfloat16 holds.
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
    PRECISION,
    check_reachable,
    four_bit_kind,
    load_four_bit,
    load_fp8,
    nf4_levels,
)
from quant.kernels.triton_launch import Launch
from quant.packed import PackedTensor

# Of a row's codes, in one step of a program.
ONE_TOKEN_BYTES = 128
MANY_TOKENS_BYTES = 32


@triton.jit
def times_vector(
    x,
    codes,
    scales,
    levels,
    rows,
    row_inside,
    groups,
    KIND: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Rows of a four-bit weight times the vector at x: float32 `[BLOCK_N]`."""
    total = tl.zeros([BLOCK_N, GROUPS, HALF], tl.float32)
    for first in range(0, groups, GROUPS):
        group = first + tl.arange(0, GROUPS)
        even, odd = load_four_bit(codes, scales, levels, rows, row_inside, group, groups, KIND, HALF)
        col = group[:, None] * (2 * HALF) + 2 * tl.arange(0, HALF)[None, :]
        inside = (group < groups)[:, None]
        x_even = tl.load(x + col, mask=inside, other=0.0).to(tl.float32)
        x_odd = tl.load(x + col + 1, mask=inside, other=0.0).to(tl.float32)
        total += even * x_even[None, :, :] + odd * x_odd[None, :, :]
    return tl.sum(tl.sum(total, axis=2), axis=1)


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
):
    """Rows x_rows of the matrix at x times rows of a four-bit weight: float32 `[BLOCK_M, BLOCK_N]`."""
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    cols = groups * (2 * HALF)
    for first in range(0, groups, GROUPS):
        group = first + tl.arange(0, GROUPS)
        even, odd = load_four_bit(codes, scales, levels, rows, row_inside, group, groups, KIND, HALF)
        even = tl.trans(tl.reshape(even, (BLOCK_N, GROUPS * HALF))).to(x.dtype.element_ty)
        odd = tl.trans(tl.reshape(odd, (BLOCK_N, GROUPS * HALF))).to(x.dtype.element_ty)
        col = 2 * (first * HALF + tl.arange(0, GROUPS * HALF))
        x_at = x + x_rows[:, None] * cols + col[None, :]
        inside = x_inside[:, None] & (col < cols)[None, :]
        total = tl.dot(tl.load(x_at, mask=inside, other=0.0), even, total, input_precision=PRECISION)
        total = tl.dot(tl.load(x_at + 1, mask=inside, other=0.0), odd, total, input_precision=PRECISION)
    return total


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
):
    """x `[tokens, 2 * HALF * groups]` -> out `[tokens, n]`; grid (blocks of n, blocks of tokens)."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_inside = rows < n
    if BLOCK_M == 1:
        total = times_vector(x, codes, scales, levels, rows, row_inside, groups, KIND, HALF, BLOCK_N, GROUPS)
        tl.store(out + rows, total.to(out.dtype.element_ty), mask=row_inside)
    else:
        token = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = token < tokens
        total = times_matrix(
            x, token, inside, codes, scales, levels, rows, row_inside, groups,
            KIND, HALF, BLOCK_M, BLOCK_N, GROUPS,
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
):
    """x `[tokens, cols]`, weight `[n, cols]` -> out `[tokens, n]`; grid (blocks of n, blocks of tokens)."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_inside = rows < n
    if BLOCK_M == 1:
        sums = tl.zeros([BLOCK_N, CHUNKS, CHUNK], tl.float32)
        for first in range(0, tl.cdiv(cols, CHUNK), CHUNKS):
            chunk = first + tl.arange(0, CHUNKS)
            weight = load_fp8(
                codes, scales, rows, row_inside, chunk, cols, scale_cols, TILE_ROWS, TILE_COLS, POWERS
            )
            col = chunk[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
            sums += weight * tl.load(x + col, mask=col < cols, other=0.0).to(tl.float32)[None, :, :]
        total = tl.sum(tl.sum(sums, axis=2), axis=1)
        tl.store(out + rows, total.to(out.dtype.element_ty), mask=row_inside)
    else:
        token = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = token < tokens
        product = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for first in range(0, tl.cdiv(cols, CHUNK), CHUNKS):
            chunk = first + tl.arange(0, CHUNKS)
            weight = load_fp8(
                codes, scales, rows, row_inside, chunk, cols, scale_cols, TILE_ROWS, TILE_COLS, POWERS
            )
            weight = tl.trans(tl.reshape(weight, (BLOCK_N, CHUNKS * CHUNK))).to(x.dtype.element_ty)
            col = first * CHUNK + tl.arange(0, CHUNKS * CHUNK)
            x_at = x + token[:, None] * cols + col[None, :]
            x_tile = tl.load(x_at, mask=inside[:, None] & (col < cols)[None, :], other=0.0)
            product = tl.dot(x_tile, weight, product, input_precision=PRECISION)
        at = out + token[:, None] * n + rows[None, :]
        tl.store(at, product.to(out.dtype.element_ty), mask=inside[:, None] & row_inside[None, :])


@dataclass(frozen=True)
class Blocks:
    """What one program computes: `tokens` x `rows` results, by `warps` of 32 threads."""

    tokens: int
    rows: int
    warps: int

    @classmethod
    def of(cls, tokens: int, dtype: torch.dtype) -> Blocks:
        """For `tokens` activations of `dtype`: as large as registers of sm_89 allow without spilling."""
        if tokens == 1:
            return cls(1, 8, 4)
        if tokens <= 16:
            return cls(16, 64, 4)
        return cls(32, 64, 4) if tokens <= 32 or dtype == torch.float32 else cls(64, 128, 8)


def four_bit_constants(weight: PackedTensor, blocks: Blocks) -> dict[str, int | bool]:
    """What kernels are compiled for, given the weight's format."""
    kind = four_bit_kind(weight)
    assert kind is not None
    half = weight.format.tile_cols // 2
    step = ONE_TOKEN_BYTES if blocks.tokens == 1 else MANY_TOKENS_BYTES
    return {
        "KIND": kind,
        "HALF": half,
        "BLOCK_M": blocks.tokens,
        "BLOCK_N": blocks.rows,
        "GROUPS": max(1, step // half),
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
        step = ONE_TOKEN_BYTES if blocks.tokens == 1 else MANY_TOKENS_BYTES
        constants: dict[str, int | bool] = {
            "TILE_ROWS": weight.format.tile_rows,
            "TILE_COLS": weight.format.tile_cols,
            "POWERS": weight.scales.dtype == torch.uint8,
            "BLOCK_M": blocks.tokens,
            "BLOCK_N": blocks.rows,
            "CHUNKS": step // CHUNK.value,
        }
        arguments = (x, weight.codes, weight.scales, out, tokens, rows, cols, weight.scales.shape[1])
        kernel = fp8_linear
    elif four_bit_kind(weight) is not None:
        constants = four_bit_constants(weight, blocks)
        groups = cols // weight.format.tile_cols
        arguments = (x, weight.codes, weight.scales, nf4_levels(x.device), out, tokens, rows, groups)
        kernel = four_bit_linear
    else:
        raise FormatError(f"{weight.format.name}: no Triton kernel multiplies with it")
    grid = (triton.cdiv(rows, blocks.rows), triton.cdiv(tokens, blocks.tokens))
    return Launch(kernel, grid, arguments, constants, blocks.warps)
