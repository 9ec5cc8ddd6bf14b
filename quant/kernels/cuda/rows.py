"""Triton: rows of a packed table, gathered and decoded in one pass; made for Engram tables.

A table may be in pinned host memory: the kernel then reads only the rows it needs over the bus.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quant.errors import FormatError
from quant.formats.fp8 import Fp8
from quant.kernels.cuda.decode import CHUNK, UNIT, four_bit_kind, load_four_bit, load_fp8, nf4_levels
from quant.kernels.cuda.launch import Launch
from quant.packed import PackedTensor

BLOCK_ROWS = 8
BLOCK_COLS = 256


@triton.jit(do_not_specialize=["count"])
def gather_fp8(
    codes,
    scales,
    wanted,
    out,
    count,
    cols,
    scale_cols,
    TILE_COLS: tl.constexpr,
    POWERS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """out `[count, cols]` float32: rows `wanted` `[count]` int64; grid (blocks of rows, of columns)."""
    place = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = place < count
    rows = tl.load(wanted + place, mask=inside, other=0)
    chunk = tl.program_id(1) * CHUNKS + tl.arange(0, CHUNKS)
    values, scale = load_fp8(codes, scales, rows, inside, chunk, cols, scale_cols, 1, TILE_COLS, POWERS)
    col = chunk[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    at = out + place.to(tl.int64)[:, None, None] * cols + col[None, :, :]
    tl.store(at, values * scale[:, :, None], mask=inside[:, None, None] & (col < cols)[None, :, :])


@triton.jit(do_not_specialize=["count"])
def gather_four_bit(
    codes,
    scales,
    levels,
    wanted,
    out,
    count,
    units,
    KIND: tl.constexpr,
    PER_SCALE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UNITS: tl.constexpr,
):
    """As `gather_fp8`, for four-bit tables of `units` times 32 columns."""
    place = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = place < count
    rows = tl.load(wanted + place, mask=inside, other=0)
    unit = tl.program_id(1) * UNITS + tl.arange(0, UNITS)
    values = load_four_bit(codes, scales, levels, rows, inside, unit, units, KIND, PER_SCALE)
    col = unit[:, None] * UNIT + tl.arange(0, UNIT)[None, :]
    at = out + place.to(tl.int64)[:, None, None] * (units * UNIT) + col[None, :, :]
    tl.store(at, values, mask=inside[:, None, None] & (unit < units)[None, :, None])


def gather_launch(table: PackedTensor, wanted: torch.Tensor, out: torch.Tensor) -> Launch:
    """The launch that writes rows `wanted` `[n]` int64 of `table` into `out` `[n, cols]` float32.

    Raises FormatError for tables whose rows share scales, and formats without a kernel.
    """
    cols = table.shape[1]
    tile = table.format.tile_cols
    assert table.scales is not None
    constants: dict[str, int | bool] = {"BLOCK_N": BLOCK_ROWS}
    grid = (triton.cdiv(len(wanted), BLOCK_ROWS), triton.cdiv(cols, BLOCK_COLS))
    kind = four_bit_kind(table)
    if kind is not None:
        constants |= {"KIND": kind, "PER_SCALE": tile // UNIT.value, "UNITS": BLOCK_COLS // UNIT.value}
        levels = nf4_levels(out.device)
        arguments = (table.codes, table.scales, levels, wanted, out, len(wanted), cols // UNIT.value)
        return Launch(gather_four_bit, grid, arguments, constants, num_warps=4)
    if not isinstance(table.format, Fp8) or table.format.tile_rows != 1:
        raise FormatError(f"{table.format.name}: no Triton kernel gathers rows in this format")
    is_power = table.scales.dtype == torch.uint8
    constants |= {"TILE_COLS": tile, "POWERS": is_power, "CHUNKS": BLOCK_COLS // CHUNK.value}
    arguments_fp8 = (table.codes, table.scales, wanted, out, len(wanted), cols, table.scales.shape[1])
    return Launch(gather_fp8, grid, arguments_fp8, constants, num_warps=4)
