"""Triton: plain matrices, one for each head or the same for all, times heads of a recorded step's rows.

Heads are columns of something wider, with others between them, and so are what they become: what is part of
a vector, or put beside another one, is read and written where it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from quant.kernels.cuda.launch import Launch
from quant.kernels.cuda.linear import Blocks, is_compiled
from quant.kernels.cuda.times import load_tile, plain_times_vector, times_tile

COPIED = 1024  # columns of a program that copies
VECTOR = 4096  # weights that a program multiplies with one row at a time


@triton.jit
def copy_columns(x, out, row, head, x_row, x_head, out_row, out_head, width, factor, BLOCK: tl.constexpr):
    """The first `width` columns of a head, times a factor."""
    for first in range(0, width, BLOCK):
        col = first + tl.arange(0, BLOCK)
        value = tl.load(x + row * x_row + head * x_head + col, mask=col < width, other=0.0)
        tl.store(out + row * out_row + head * out_head + col, value * factor, mask=col < width)


@triton.jit
def move_columns(x, out, x_row, x_head, out_row, out_head, width, factor, BLOCK: tl.constexpr):
    """Columns of heads from one place to another. Grid (heads, rows)."""
    copy_columns(
        x, out, tl.program_id(1), tl.program_id(0), x_row, x_head, out_row, out_head, width, factor, BLOCK
    )


@triton.jit
def head_products(
    x, weight, out, beside, beside_out, tokens, rows_n, cols, matrix, x_row, x_head, out_row, out_head,
    copied, factor,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STEP: tl.constexpr, PARTS: tl.constexpr,
    COPIES: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """factor * weight_h `[rows_n, cols]` times head h of x, for each head; matrices are `matrix` elements
    apart. With COPIES, factor * `copied` columns at `beside` go to `beside_out`. Grid (blocks of rows, and
    one more that copies; heads; blocks of tokens)."""
    head = tl.program_id(1)
    blocks = tl.cdiv(rows_n, BLOCK_N)
    if COPIES and (tl.program_id(0) == blocks):
        for number in range(0, BLOCK_M):
            row = tl.program_id(2) * BLOCK_M + number
            if row < tokens:
                copy_columns(
                    beside, beside_out, row, head, x_row, x_head, out_row, out_head, copied, factor, BLOCK_C
                )
    else:
        rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        row_inside = rows < rows_n
        own = weight + head.to(tl.int64) * matrix
        if BLOCK_M == 1:
            token = tl.program_id(2)
            vector = x + token * x_row + head * x_head
            total = plain_times_vector(vector, own, rows, row_inside, cols, BLOCK_N, STEP) * factor
            tl.store(out + token * out_row + head * out_head + rows, total, mask=row_inside)
        else:
            token = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
            inside = token < tokens
            total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for first in range(0, cols, STEP):
                col = first + tl.arange(0, STEP)
                part = load_tile(own, rows, row_inside, col, cols).to(tl.float32)
                source = x + token[:, None] * x_row + head * x_head + col[None, :]
                values = tl.load(source, mask=inside[:, None] & (col < cols)[None, :], other=0.0)
                total = times_tile(values, tl.trans(part), total, PARTS)
            to = out + token[:, None] * out_row + head * out_head + rows[None, :]
            tl.store(to, total * factor, mask=inside[:, None] & row_inside[None, :])


@dataclass(frozen=True)
class Columns:
    """Where heads are in rows `[rows, width]`: the first begins at column `first`, the next ones `step`
    further."""

    rows: torch.Tensor
    first: int
    step: int

    @property
    def begin(self) -> torch.Tensor:
        """From the first head on."""
        return self.rows[:, self.first :]


def head_products_launch(
    x: Columns,
    weight: torch.Tensor,
    out: Columns,
    heads: int,
    rows: int,
    factor: float,
    beside: tuple[Columns, Columns, int] | None,
) -> Launch:
    """The launch for the first `rows` rows.

    weight  `[heads, rows, cols]`, or one matrix for all heads
    beside  what else is copied, where to, and how many columns of each head, which are as far apart
    """
    n, rows_n, cols = weight.shape
    device = x.rows.device
    blocks = Blocks.of(rows, torch.float32).on(device)
    step = min(blocks.cols, int(triton.next_power_of_2(max(16, cols))))
    block_rows = min(128, VECTOR // step) if blocks.tokens == 1 and is_compiled(device) else blocks.rows
    constants: dict[str, int | bool] = {
        "BLOCK_M": blocks.tokens, "BLOCK_N": block_rows, "STEP": step,
        "PARTS": is_compiled(device) and weight.dtype == torch.bfloat16,
        "COPIES": beside is not None,
        "BLOCK_C": 1 if beside is None else int(triton.next_power_of_2(min(COPIED, beside[2]))),
    }  # fmt: skip
    source, target, copied = (x, out, 0) if beside is None else beside
    arguments = (
        x.begin, weight, out.begin, source.begin, target.begin, rows, rows_n, cols,
        rows_n * cols if n > 1 else 0, x.rows.shape[1], x.step, out.rows.shape[1], out.step, copied, factor,
    )  # fmt: skip
    grid = (-(-rows_n // block_rows) + (beside is not None), heads, -(-rows // blocks.tokens))
    return Launch(head_products, grid, arguments, constants, blocks.warps)


def move_launch(x: Columns, out: Columns, heads: int, width: int, rows: int, factor: float) -> Launch:
    """The launch that copies `width` columns of each head of the first `rows` rows, times a factor."""
    block = int(triton.next_power_of_2(min(COPIED, width)))
    sizes = x.rows.shape[1], x.step, out.rows.shape[1], out.step, width, factor
    return Launch(move_columns, (heads, rows), (x.begin, out.begin, *sizes), {"BLOCK": block}, 4)
