"""Triton: `x @ weight^T` for packed and bfloat16 weights, for few tokens and for many.

Few tokens: every program multiplies four rows, a thousand columns at a time, with one x; reading the weight
dominates. More tokens: tiles go through the tensor cores (times.py). Programs that share rows of the weight
are neighbours, so the GPU's memory is read once and its cache gives the rest.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from quant.errors import FormatError
from quant.formats.fp8 import Fp8
from quant.formats.mxfp4 import Mxfp4
from quant.kernels.cuda.decode import (
    CHUNK,
    UNIT,
    check_reachable,
    four_bit_kind,
    nf4_levels,
)
from quant.kernels.cuda.launch import Launch
from quant.kernels.cuda.times import (
    fp8_times_matrix,
    fp8_times_vector,
    plain_times_matrix,
    plain_times_vector,
    store_tile,
    times_matrix,
    times_vector,
)
from quant.kernels.interface import Weight
from quant.packed import PackedTensor

FEW_TOKENS = 4
INTERPRETED_ROWS, INTERPRETED_COLS = 256, 256  # at most, of a program in Triton's interpreter


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

    def on(self, device: torch.device) -> Blocks:
        """These, or, where kernels are interpreted, so many rows that programs are few, since they run one
        after the other, and no more columns than small models have."""
        if is_compiled(device):
            return self
        return replace(self, rows=INTERPRETED_ROWS, cols=min(self.cols, INTERPRETED_COLS))


def is_compiled(device: torch.device) -> bool:
    """Whether kernels are compiled for it, if only to look at them; where they are not, Triton's interpreter
    runs them, which cannot multiply bfloat16."""
    return device.type in ("cuda", "meta")


def is_in_parts(x: torch.Tensor, weight: Weight) -> bool:
    """What kernels take as IN_PARTS; never in the interpreter, which cannot multiply bfloat16."""
    if x.dtype != torch.float32 or not is_compiled(x.device):
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
