"""Triton: what a sublayer adds to a residual stream, and the norm of the sum that the next one reads, for the
few rows of a recorded step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from quant.kernels.cuda.launch import Launch
from quant.kernels.cuda.streams import Choices, choices_launch, choices_sum

COLUMNS = 2048  # at a time


@triton.jit
def add_residual(
    x, y, apart, weights, mail, places, total, weight, out, width, factor, eps,
    HAS_Y: tl.constexpr, CHOICES: tl.constexpr, MAILED: tl.constexpr, NORMED: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """total = x + factor * (y + the weighted sum of choices), and out, its norm times weight, all `[rows,
    width]`; grid (rows). See `choices_sum`."""
    row = tl.program_id(0)
    squares = tl.zeros([BLOCK_N], tl.float32)
    for first in range(0, width, BLOCK_N):
        col = first + tl.arange(0, BLOCK_N)
        inside = col < width
        more = tl.zeros([BLOCK_N], tl.float32)
        if CHOICES > 0:
            more = choices_sum(apart, weights, mail, places, row, col, inside, width, CHOICES, MAILED)
        if HAS_Y:
            more += tl.load(y + row * width + col, mask=inside, other=0.0)
        value = tl.load(x + row * width + col, mask=inside, other=0.0) + factor * more
        tl.store(total + row * width + col, value, mask=inside)
        squares += value * value
    if NORMED:
        tl.debug_barrier()
        norm = tl.rsqrt(tl.sum(squares, axis=0) / width + eps)
        for first in range(0, width, BLOCK_N):
            col = first + tl.arange(0, BLOCK_N)
            inside = col < width
            value = tl.load(total + row * width + col, mask=inside, other=0.0) * norm
            value *= tl.load(weight + col, mask=inside, other=0.0)
            tl.store(out + row * width + col, value, mask=inside)


@dataclass(frozen=True)
class Residual:
    """A residual and what is added to it, all `[rows, width]`.

    y, choices  a sublayer's output: this, or the sum of choices, or both
    factor      of it
    total       the sum
    weight      `[width]`: out is the sum by its root mean square, times this; None where it is not wanted
    """

    x: torch.Tensor
    y: torch.Tensor | None
    factor: float
    total: torch.Tensor
    weight: torch.Tensor | None
    eps: float | None
    out: torch.Tensor | None
    choices: Choices | None

    def launch(self, rows: int) -> Launch:
        """The launch for the first `rows` rows."""
        width = self.x.shape[1]
        others, constants = choices_launch(self.choices, self.x)
        arguments = (
            self.x, self.x if self.y is None else self.y, *others, self.total,
            self.x if self.weight is None else self.weight, self.x if self.out is None else self.out,
            width, float(self.factor), float(self.eps or 0.0),
        )  # fmt: skip
        constants |= {
            "HAS_Y": self.y is not None,
            "NORMED": self.weight is not None,
            "BLOCK_N": min(COLUMNS, int(triton.next_power_of_2(width))),
        }
        return Launch(add_residual, (rows,), arguments, constants, 8)
