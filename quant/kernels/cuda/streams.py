"""Triton: RMSNorm and parallel streams (mHC), for the few rows of a recorded step.

The mixes of a sublayer are read off all streams at once, 80 kB a row in V4.1: `SPLIT` columns a program,
whose
sums the next launch adds up and makes mixes of. What reads the streams with the mix before runs beside it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from quant.kernels.cuda.launch import Launch
from quant.kernels.cuda.sinkhorn import doubly_stochastic

SPLIT = 512  # columns of all streams that a program reads
MOST_SPLITS = 64
BLOCK = 1024
SUM, TIMES, GATED = 0, 1, 2  # what `combine_elements` does


@triton.jit
def part_sum(x, parts_weights, row, col, inside, width, PARTS: tl.constexpr):
    """Columns of row `row` at x; with PARTS, of as many parts side by side, weighted."""
    if PARTS == 0:
        return tl.load(x + row * width + col, mask=inside, other=0.0)
    total = tl.zeros_like(col).to(tl.float32)
    for part in tl.static_range(PARTS):
        weight = tl.load(parts_weights + row * PARTS + part)
        total += weight * tl.load(x + (row * PARTS + part) * width + col, mask=inside, other=0.0)
    return total


@triton.jit
def norm_row(
    x, parts_weights, weight, out, row, width, eps,
    PARTS: tl.constexpr, NORMED: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One row: the weighted sum of its parts, by its root mean square, times a weight."""
    squares = tl.zeros([BLOCK_N], tl.float32)
    factor = 1.0
    if NORMED:
        for first in range(0, width, BLOCK_N):
            col = first + tl.arange(0, BLOCK_N)
            value = part_sum(x, parts_weights, row, col, col < width, width, PARTS)
            squares += value * value
        factor = tl.rsqrt(tl.sum(squares, axis=0) / width + eps)
    for first in range(0, width, BLOCK_N):
        col = first + tl.arange(0, BLOCK_N)
        inside = col < width
        value = part_sum(x, parts_weights, row, col, inside, width, PARTS) * factor
        if WEIGHTED:
            value *= tl.load(weight + col, mask=inside, other=0.0)
        tl.store(out + row * width + col, value, mask=inside)


@triton.jit
def mix_part(
    streams, fn, parts, row, split, splits, cols, count,
    COUNT: tl.constexpr, SPLIT_N: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What SPLIT_N columns of a row's streams contribute: products with fn `[count, cols]`, then squares."""
    which = tl.arange(0, COUNT)
    total = tl.zeros([COUNT, BLOCK_N], tl.float32)
    squares = tl.zeros([BLOCK_N], tl.float32)
    for first in range(0, SPLIT_N, BLOCK_N):
        col = split * SPLIT_N + first + tl.arange(0, BLOCK_N)
        inside = col < cols
        value = tl.load(streams + row * cols + col, mask=inside, other=0.0)
        at = fn + which[:, None] * cols + col[None, :]
        weight = tl.load(at, mask=(which < count)[:, None] & inside[None, :], other=0.0)
        total += weight * value[None, :]
        squares += value * value
    sums = tl.sum(total, axis=1)
    sums = tl.where(which == count, tl.sum(squares, axis=0), sums)
    tl.store(parts + (row * splits + split) * COUNT + which, sums)


@triton.jit
def read_streams(
    streams, fn, parts, splits, cols, count, x, pre, weight, out, width, eps,
    COUNT: tl.constexpr, SPLIT_N: tl.constexpr, BLOCK_N: tl.constexpr,
    PARTS: tl.constexpr, NORMED: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """`mix_part` of streams `[rows, cols]` for each of `splits`, and beside it `norm_row` of x, to parts
    `[rows, splits, COUNT]` and out `[rows, width]`; grid (splits, and one more for x; rows)."""
    row = tl.program_id(1)
    if tl.program_id(0) < splits:
        mix_part(streams, fn, parts, row, tl.program_id(0), splits, cols, count, COUNT, SPLIT_N, BLOCK_N)
    else:
        norm_row(x, pre, weight, out, row, width, eps, PARTS, NORMED, WEIGHTED, BLOCK_N)


@triton.jit
def added_up(parts, row, splits, index, COUNT: tl.constexpr, SPLITS: tl.constexpr):
    """Sums `[index]` over the splits of a row's parts."""
    split = tl.arange(0, SPLITS)
    at = parts + (row * splits + split)[:, None] * COUNT + index[None, :]
    return tl.sum(tl.load(at, mask=(split < splits)[:, None], other=0.0), axis=0)


@triton.jit
def finish_mix(
    parts, scale, base, pre, post, combine, row, splits, cols, turns, eps, norm_eps,
    N: tl.constexpr, COUNT: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """A row's mixes of its parts: pre and post `[N]`, combine `[N, N]`."""
    each = tl.arange(0, N)
    square = tl.arange(0, N * N)
    squares = added_up(parts, row, splits, tl.full([1], (2 + N) * N, tl.int32), COUNT, SPLITS)
    factor = tl.rsqrt(squares / cols + norm_eps)
    before = added_up(parts, row, splits, each, COUNT, SPLITS) * factor
    after = added_up(parts, row, splits, N + each, COUNT, SPLITS) * factor
    between = added_up(parts, row, splits, 2 * N + square, COUNT, SPLITS) * factor
    before = before * tl.load(scale + each) + tl.load(base + each)
    after = after * tl.load(scale + N + each) + tl.load(base + N + each)
    between = between * tl.load(scale + 2 * N + square) + tl.load(base + 2 * N + square)
    tl.store(pre + row * N + each, 1.0 / (1.0 + tl.exp(-before)) + eps)
    tl.store(post + row * N + each, 2.0 / (1.0 + tl.exp(-after)))
    mixed = doubly_stochastic(tl.reshape(between, (1, N, N)), turns, eps)
    tl.store(combine + row * N * N + square, tl.reshape(mixed, (N * N,)))


@triton.jit
def finish_reading(
    parts, scale, base, pre, row, splits, cols, eps, norm_eps,
    N: tl.constexpr, COUNT: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """A row's pre `[N]` of its parts, where nothing else is read off."""
    each = tl.arange(0, N)
    squares = added_up(parts, row, splits, tl.full([1], N, tl.int32), COUNT, SPLITS)
    before = added_up(parts, row, splits, each, COUNT, SPLITS) * tl.rsqrt(squares / cols + norm_eps)
    before = before * tl.load(scale + each) + tl.load(base + each)
    tl.store(pre + row * N + each, 1.0 / (1.0 + tl.exp(-before)) + eps)


@triton.jit
def write_streams(
    streams, y, post, combine, apart, weights, mail, places, out, width,
    N: tl.constexpr, CHOICES: tl.constexpr, MAILED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out_j = post_j * y + sum_i combine[i, j] * stream_i, `[rows, N, width]`; grid (blocks of width, rows).

    With CHOICES, y is added to the weighted sum of apart `[rows, CHOICES, width]`, in order. With MAILED,
    choices whose place `[rows, CHOICES]` is negative are in `mail` instead.
    """
    row = tl.program_id(1)
    col = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = col < width
    value = summed(y, apart, weights, mail, places, row, col, inside, width, CHOICES, MAILED)
    for j in tl.static_range(N):
        total = tl.load(post + row * N + j) * value
        for i in tl.static_range(N):
            share = tl.load(combine + (row * N + i) * N + j)
            total += share * tl.load(streams + (row * N + i) * width + col, mask=inside, other=0.0)
        tl.store(out + (row * N + j) * width + col, total, mask=inside)


@triton.jit
def summed(
    y, apart, weights, mail, places, row, col, inside, width, CHOICES: tl.constexpr, MAILED: tl.constexpr
):
    """Columns of a row of y, with the weighted sum of its choices before it."""
    value = tl.load(y + row * width + col, mask=inside, other=0.0)
    if CHOICES == 0:
        return value
    return choices_sum(apart, weights, mail, places, row, col, inside, width, CHOICES, MAILED) + value


@triton.jit
def choices_sum(
    apart, weights, mail, places, row, col, inside, width, CHOICES: tl.constexpr, MAILED: tl.constexpr
):
    """Columns of the weighted sum of a row's choices, in order."""
    total = tl.zeros_like(col).to(tl.float32)
    for choice in tl.static_range(CHOICES):
        pair = row * CHOICES + choice
        at = pair * width + col
        if MAILED:
            is_here = tl.load(places + pair) >= 0
            part = tl.load(apart + at, mask=inside & is_here, other=0.0)
            part += tl.load(mail + at, mask=inside & (is_here == 0), other=0.0)
        else:
            part = tl.load(apart + at, mask=inside, other=0.0)
        total += tl.load(weights + pair) * part
    return total


@triton.jit
def add_up(
    y, apart, weights, mail, places, out, width,
    CHOICES: tl.constexpr, MAILED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y and the weighted sum of choices: `[rows, width]`; grid (blocks of width, rows)."""
    row = tl.program_id(1)
    col = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = col < width
    value = summed(y, apart, weights, mail, places, row, col, inside, width, CHOICES, MAILED)
    tl.store(out + row * width + col, value, mask=inside)


@triton.jit
def add_engram(streams, kv, qk, out, width, eps, N: tl.constexpr, BLOCK_N: tl.constexpr):
    """Streams and the gated value of table rows; kv `[rows, N + 1, width]`; grid (N, rows)."""
    row = tl.program_id(1)
    at = streams + (row * N + tl.program_id(0)) * width
    keys = kv + (row * (N + 1) + tl.program_id(0)) * width
    values = kv + (row * (N + 1) + N) * width
    dots = tl.zeros([BLOCK_N], tl.float32)
    squares, of_keys = tl.zeros([BLOCK_N], tl.float32), tl.zeros([BLOCK_N], tl.float32)
    for first in range(0, width, BLOCK_N):
        col = first + tl.arange(0, BLOCK_N)
        stream = tl.load(at + col, mask=col < width, other=0.0)
        key = tl.load(keys + col, mask=col < width, other=0.0)
        dots += stream * tl.load(qk + tl.program_id(0) * width + col, mask=col < width, other=0.0) * key
        squares += stream * stream
        of_keys += key * key
    dot = tl.sum(dots, axis=0) * tl.rsqrt(tl.sum(squares, axis=0) / width + eps)
    dot = dot * tl.rsqrt(tl.sum(of_keys, axis=0) / width + eps) * tl.rsqrt(width.to(tl.float32))
    root = tl.sqrt(tl.maximum(tl.abs(dot), 1e-6))
    signed = tl.where(dot > 0, root, tl.where(dot < 0, -root, 0.0))
    gate = 1.0 / (1.0 + tl.exp(-signed))
    for first in range(0, width, BLOCK_N):
        col = first + tl.arange(0, BLOCK_N)
        inside = col < width
        stream = tl.load(at + col, mask=inside, other=0.0)
        total = stream + gate * tl.load(values + col, mask=inside, other=0.0)
        tl.store(out + (row * N + tl.program_id(0)) * width + col, total, mask=inside)


@triton.jit
def combine_elements(x, y, out, count, number, KIND: tl.constexpr, BLOCK_N: tl.constexpr):
    """Element by element, by KIND: x + y, x * number, or the gated product, limited by it."""
    at = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = at < count
    value = tl.load(x + at, mask=inside, other=0.0)
    if KIND == 0:
        value += tl.load(y + at, mask=inside, other=0.0)
    elif KIND == 1:
        value *= number
    else:
        gate = tl.minimum(value, number)
        up = tl.load(y + at, mask=inside, other=0.0)
        value = gate / (1.0 + tl.exp(-gate)) * tl.minimum(tl.maximum(up, -number), number)
    tl.store(out + at, value, mask=inside)


@triton.jit
def repeat_row(x, out, width, N: tl.constexpr, BLOCK_N: tl.constexpr):
    """out `[rows, N, width]` of x `[rows, width]`; grid (blocks of width, rows)."""
    row = tl.program_id(1)
    col = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    value = tl.load(x + row * width + col, mask=col < width, other=0.0)
    for i in tl.static_range(N):
        tl.store(out + (row * N + i) * width + col, value, mask=col < width)


@dataclass(frozen=True)
class MixShape:
    """How the mixes of N streams of `cols` columns in all are read off.

    count    numbers that are read off
    splits   programs that share the columns
    is_reading  only how they are read is wanted, not how they are written and mixed
    """

    n: int
    cols: int
    is_reading: bool = False

    @classmethod
    def n_of(cls, count: int) -> int:
        """How many streams have so many numbers to their mixes."""
        return math.isqrt(count + 1) - 1

    @property
    def count(self) -> int:
        return self.n if self.is_reading else (2 + self.n) * self.n

    @property
    def padded(self) -> int:
        """Numbers of a part: what is read off, and the sum of squares."""
        return int(triton.next_power_of_2(self.count + 1))

    @property
    def split(self) -> int:
        """Columns of a program, a power of two."""
        return max(SPLIT, int(triton.next_power_of_2(-(-self.cols // MOST_SPLITS))))

    @property
    def splits(self) -> int:
        return -(-self.cols // self.split)


@dataclass(frozen=True)
class Mixed:
    """Streams `[rows, n * width]` of which parts `[rows, splits, padded]` of mixes are read by fn."""

    streams: torch.Tensor
    fn: torch.Tensor
    parts: torch.Tensor
    shape: MixShape


@dataclass(frozen=True)
class Read:
    """x `[rows, width]`, or with pre `[rows, parts]` the weighted sum of its parts, to out `[rows, width]`.

    eps     normalised by the root mean square, if given
    weight  times this, then
    """

    x: torch.Tensor
    pre: torch.Tensor | None
    weight: torch.Tensor | None
    eps: float | None
    out: torch.Tensor


def read_launch(mixed: Mixed | None, read: Read | None, rows: int) -> Launch:
    """The launch that reads both, or one of them, for the first `rows` rows."""
    first = mixed.streams if mixed is not None else read.x if read is not None else None
    assert first is not None
    shape = MixShape(1, 0) if mixed is None else mixed.shape
    streams, fn, parts = (first,) * 3 if mixed is None else (mixed.streams, mixed.fn, mixed.parts)
    is_weighted = read is not None and read.weight is not None
    x, pre, weight, out = (
        first if tensor is None else tensor
        for tensor in ((None,) * 4 if read is None else (read.x, read.pre, read.weight, read.out))
    )
    arguments = (
        streams, fn, parts, shape.splits, shape.cols, shape.count,
        x, pre, weight, out, out.shape[1], 0.0 if read is None or read.eps is None else read.eps,
    )  # fmt: skip
    constants: dict[str, int | bool] = {
        "COUNT": shape.padded,
        "SPLIT_N": shape.split,
        "BLOCK_N": SPLIT,
        "PARTS": 0 if read is None or read.pre is None else read.pre.shape[1],
        "NORMED": read is not None and read.eps is not None,
        "WEIGHTED": is_weighted,
    }
    return Launch(read_streams, (shape.splits + (read is not None), rows), arguments, constants, 4)


@dataclass(frozen=True)
class Choices:
    """Outputs of a row's chosen experts, `[rows, choices * width]`, and their weights `[rows, choices]`.

    mail, places  where a place `[rows, choices]` is negative, the output is in mail instead
    """

    apart: torch.Tensor
    weights: torch.Tensor
    mail: torch.Tensor | None = None
    places: torch.Tensor | None = None


def write_launch(
    streams: torch.Tensor,
    y: torch.Tensor,
    post: torch.Tensor,
    combine: torch.Tensor,
    choices: Choices | None,
    out: torch.Tensor,
    rows: int,
) -> Launch:
    """The launch that writes y, and the sum of choices, to the streams."""
    width, n = y.shape[1], post.shape[1]
    others, constants = choices_launch(choices, y)
    arguments = (streams, y, post, combine, *others, out, width)
    constants |= {"N": n, "BLOCK_N": BLOCK}
    return Launch(write_streams, (-(-width // BLOCK), rows), arguments, constants, 4)


def add_up_launch(y: torch.Tensor, choices: Choices, out: torch.Tensor, rows: int) -> Launch:
    """The launch that adds the sum of choices to y."""
    others, constants = choices_launch(choices, y)
    constants |= {"BLOCK_N": BLOCK}
    width = y.shape[1]
    return Launch(add_up, (-(-width // BLOCK), rows), (y, *others, out, width), constants, 4)


def choices_launch(
    choices: Choices | None, other: torch.Tensor
) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], dict[str, int | bool]]:
    """What a kernel takes for `choices_sum`: tensors (`other` where there is none), and constants."""
    if choices is None:
        return (other,) * 4, {"CHOICES": 0, "MAILED": False}
    mail = other if choices.mail is None else choices.mail
    places = other if choices.places is None else choices.places
    constants: dict[str, int | bool] = {
        "CHOICES": choices.weights.shape[1],
        "MAILED": choices.mail is not None,
    }
    return (choices.apart, choices.weights, mail, places), constants


def engram_launch(
    streams: torch.Tensor, kv: torch.Tensor, qk: torch.Tensor, eps: float, out: torch.Tensor, rows: int
) -> Launch:
    """The launch that adds the gated value in kv `[rows, (n + 1) * width]` to the streams; qk `[n,
    width]`."""
    n, width = qk.shape
    constants: dict[str, int | bool] = {"N": n, "BLOCK_N": SPLIT}
    return Launch(add_engram, (n, rows), (streams, kv, qk, out, width, eps), constants, 4)


def repeat_launch(x: torch.Tensor, n: int, out: torch.Tensor, rows: int) -> Launch:
    """The launch that puts x n times side by side."""
    width = x.shape[1]
    constants: dict[str, int | bool] = {"N": n, "BLOCK_N": BLOCK}
    return Launch(repeat_row, (-(-width // BLOCK), rows), (x, out, width), constants, 4)


def elements_launch(
    kind: int, x: torch.Tensor, y: torch.Tensor | None, out: torch.Tensor, rows: int, number: float
) -> Launch:
    """SUM: x + y; TIMES: x * number; GATED: silu(min(x, number)) * clamp(y, -number, number)."""
    count = rows * x.shape[1]
    arguments = (x, x if y is None else y, out, count, float(number))
    constants: dict[str, int | bool] = {"KIND": kind, "BLOCK_N": BLOCK}
    return Launch(combine_elements, (-(-count // BLOCK),), arguments, constants, 4)
