"""Triton: which compressed entries the rows of a recorded step attend to, without asking the host how many.

Scores are made for as many entries as a sequence may ever have; programs behind the newest one stop at once.
The best are found exactly, the first of equals first: the order of scores is the order of 32-bit numbers, of
which the k-th largest is found bit by bit. Of many entries, each chunk's best are found first, side by side.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from quant.formats.rows import Rows, bytes_of, row_format_of
from quant.kernels.cuda.attention import channels_of
from quant.kernels.cuda.launch import Launch
from quant.kernels.cuda.row_codes import RowCodes, limit_bits, rounded, row_channels
from quant.kernels.cuda.times import PRECISION

COLUMNS = 64  # of a program that makes scores
CHANNELS = 64  # at a time
CHANNELS_OF_CODES = 32  # of encoded keys: their decoding needs registers too
TILE = 4096  # scores that a program looks at together
LEAST_HEADS = 16  # what tensor cores take
MANY_HEADS = 32


@triton.jit
def entries_of(column, pool, row, visible, block, blocks, POOLED: tl.constexpr):
    """The entries that columns stand for: themselves, or those of the pool's blocks `[rows, blocks]`; -1
    where there is none."""
    entry = column
    inside = column < visible
    if POOLED:
        inside = column < blocks * block
        named = tl.load(pool + row * blocks + column // block, mask=inside, other=-1)
        entry = named * block + column % block
        inside = inside & (named >= 0) & (entry < visible)
    return tl.where(inside, entry, -1)


@triton.jit
def index_scores(
    queries, weights, keys, turns, pool, step, scores, maxima, columns, heads, dim, pairs, key_stride, ratio,
    block, blocks, factor, key_step,
    POOLED: tl.constexpr, MAXIMA: tl.constexpr, MAX: tl.constexpr,
    HEADS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
    CODE: tl.constexpr, SCALE: tl.constexpr, GROUP: tl.constexpr, CODED: tl.constexpr,
    TAIL_AT: tl.constexpr, SCALES_AT: tl.constexpr, LIMIT_BITS: tl.constexpr,
):  # fmt: skip
    """scores `[rows, columns]`: sum_h weight_h * factor * relu(q_h . k), -inf for what a row does not see,
    queries rounded like keys if there are LIMIT_BITS; and with MAXIMA the best of each block of BLOCK
    entries. Grid (blocks of columns, rows)."""
    row = tl.program_id(1)
    first_column = tl.program_id(0) * COLUMNS
    visible = tl.where(row < tl.load(step), (tl.load(step + 1 + MAX + row) + 1) // ratio, 0)
    if POOLED or (first_column < visible):
        column = first_column + tl.arange(0, COLUMNS)
        entry = entries_of(column, pool, row, visible, block, blocks, POOLED)
        is_seen = entry >= 0
        key_at = tl.load(step + 1 + row) * key_stride + tl.maximum(entry, 0) * key_step
        head = tl.arange(0, HEADS)
        query_at = (row * heads + tl.minimum(head, heads - 1)) * dim
        dots = tl.zeros([HEADS, COLUMNS], tl.float32)
        for first in range(0, dim, CHANNELS):
            q = channels_of(queries, query_at, first, dim, turns + row * 2 * pairs, pairs, CHANNELS)
            if LIMIT_BITS:
                q = rounded(q, CODE, GROUP, LIMIT_BITS, CHANNELS)
            k = row_channels(
                keys, key_at, is_seen, first, dim, CODE, SCALE, GROUP, CODED, TAIL_AT, SCALES_AT, CHANNELS
            )
            dots = tl.dot(q, tl.trans(k), dots, input_precision=PRECISION)
        weight = tl.load(weights + row * heads + head, mask=head < heads, other=0.0) * factor
        score = tl.sum(tl.maximum(dots, 0.0) * weight[:, None], axis=0) + 0.0  # no negative zeros
        score = tl.where(is_seen, score, float("-inf"))
        tl.store(scores + row * columns + column, score, mask=column < columns)
        if MAXIMA:
            best = tl.max(tl.reshape(score, (COLUMNS // BLOCK, BLOCK)), axis=1)
            number = first_column // BLOCK + tl.arange(0, COLUMNS // BLOCK)
            best = tl.where(number == (visible - 1) // BLOCK, float("inf"), best)
            inside = number < tl.cdiv(columns, BLOCK)
            tl.store(maxima + row * tl.cdiv(columns, BLOCK) + number, best, mask=inside)


@triton.jit
def order_of(scores, at, inside):
    """Scores as numbers in their order, 0 for -inf and outside."""
    score = tl.load(scores + at, mask=inside, other=float("-inf"))
    bits = score.to(tl.int32, bitcast=True)
    number = tl.where(bits < 0, ~bits, bits | -0x80000000).to(tl.uint32, bitcast=True)
    return tl.where(score > float("-inf"), number, 0)


@triton.jit
def threshold_of(scores, count, k, TILE: tl.constexpr):
    """The k-th largest of the numbers of `count` scores, 0 if there are fewer; and how many are larger."""
    threshold = tl.full([], 0, tl.uint32)
    for bit in range(0, 32):
        probe = threshold | (tl.full([], 0x80000000, tl.uint32) >> bit)
        found = 0
        for first in range(0, count, TILE):
            at = first + tl.arange(0, TILE)
            found += tl.sum((order_of(scores, at, at < count) >= probe).to(tl.int32), axis=0)
        threshold = tl.where(found >= k, probe, threshold)
    larger = 0
    for first in range(0, count, TILE):
        at = first + tl.arange(0, TILE)
        larger += tl.sum((order_of(scores, at, at < count) > threshold).to(tl.int32), axis=0)
    return threshold, larger


@triton.jit
def taken_of(number, threshold, left, equal):
    """Which of the numbers are among the best: larger ones, and the first `left` equal ones, of which there
    were `equal` before; and how many are equal now."""
    is_equal = (number == threshold) & (number > 0)
    order = tl.cumsum(is_equal.to(tl.int32), axis=0) + equal
    taken = (number > threshold) | (is_equal & (order <= left))
    return taken, equal + tl.sum(is_equal.to(tl.int32), axis=0)


@triton.jit
def chunk_best(
    scores, step, best, names, columns, ratio, k, chunks, POOLED: tl.constexpr, MAX: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """best and names `[rows, chunks, k]`: scores of each chunk's k best columns, and these, ascending; -inf
    behind. Grid (chunks, rows)."""
    row, chunk = tl.program_id(1), tl.program_id(0)
    visible = columns
    if not POOLED:
        visible = tl.where(row < tl.load(step), (tl.load(step + 1 + MAX + row) + 1) // ratio, 0).to(tl.int32)
    count = tl.minimum(visible - chunk * TILE, TILE)
    if count > 0:
        at_scores = scores + row * columns + chunk * TILE
        threshold, larger = threshold_of(at_scores, count, k, TILE)
        at = tl.arange(0, TILE)
        number = order_of(at_scores, at, at < count)
        taken, _ = taken_of(number, threshold, k - larger, 0)
        place = tl.cumsum(taken.to(tl.int32), axis=0) - 1
        to = (row * chunks + chunk) * k
        score = tl.load(at_scores + at, mask=taken, other=0.0)
        tl.store(best + to + place, score, mask=taken)
        tl.store(names + to + place, (chunk * TILE + at).to(tl.int64), mask=taken)
        behind = tl.sum(taken.to(tl.int32), axis=0) + at
        tl.store(best + to + behind, tl.full([TILE], float("-inf"), tl.float32), mask=behind < k)


@triton.jit
def best_columns(
    scores, names, count, k, out, pool, row, visible, block, blocks,
    NAMED: tl.constexpr, POOLED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """out `[k]`: the entries of the k best of `count` scores, ascending; -1 behind."""
    threshold, larger = threshold_of(scores, count, k, TILE)
    done, equal = 0, 0
    for first in range(0, count, TILE):
        at = first + tl.arange(0, TILE)
        taken, equal = taken_of(order_of(scores, at, at < count), threshold, k - larger, equal)
        column = at.to(tl.int64)
        if NAMED:
            column = tl.load(names + at, mask=taken, other=0)
        entry = entries_of(column, pool, row, visible, block, blocks, POOLED)
        place = done + tl.cumsum(taken.to(tl.int32), axis=0) - 1
        tl.store(out + place, entry, mask=taken)
        done += tl.sum(taken.to(tl.int32), axis=0)
    for first in range(done, k, TILE):
        at = first + tl.arange(0, TILE)
        tl.store(out + at, tl.full([TILE], -1, tl.int64), mask=at < k)


@triton.jit
def choose(
    scores, names, maxima, pool, step, chosen, best_blocks, columns, chunks, ratio, k, block, blocks,
    NAMED: tl.constexpr, POOLED: tl.constexpr, MAX: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """chosen `[rows, k]`, entries ascending, of scores `[rows, columns]`, or, if NAMED, of what `chunk_best`
    has left; and best_blocks `[rows, blocks]` of maxima. Grid (rows, 1, or 2 with blocks)."""
    row = tl.program_id(0)
    visible = tl.where(row < tl.load(step), (tl.load(step + 1 + MAX + row) + 1) // ratio, 0).to(tl.int32)
    if tl.program_id(1) == 0:
        count = columns if POOLED else visible
        if NAMED:
            width = chunks * k
            count = tl.cdiv(count, TILE) * k
        else:
            width = columns
        best_columns(
            scores + row * width, names + row * width, count, k, chosen + row * k, pool, row, visible, block,
            blocks, NAMED, POOLED, TILE,
        )  # fmt: skip
    else:
        best_columns(
            maxima + row * tl.cdiv(columns, block), names, tl.cdiv(visible, block), blocks,
            best_blocks + row * blocks, pool, row, tl.cdiv(visible, block), block, blocks, False, False, TILE,
        )  # fmt: skip


@dataclass(frozen=True)
class Choice:
    """How a row's entries are chosen, and where to.

    queries   `[rows, heads * dim]`, still to be turned where there are turns `[rows, 2 * pairs]`
    weights   `[rows, heads]`, to be multiplied by `factor`
    keys      `[slots, entries, dim]`, one for `ratio` tokens
    pool      `[rows, blocks]` of `block` entries each, to choose among; None: among all
    chosen    `[rows, k]` int64
    scores    `[rows, columns]`, maxima `[rows, blocks of entries]`, best and names `[rows, chunks * k]`: for
              results
              on the way
    best_blocks  `[rows, blocks]` int64, if later choices are to be made among these
    is_rounded   the queries are like the keys already
    """

    queries: torch.Tensor
    turns: torch.Tensor | None
    weights: torch.Tensor
    factor: float
    keys: Rows
    ratio: int
    block: int
    blocks: int
    pool: torch.Tensor | None
    chosen: torch.Tensor
    scores: torch.Tensor
    maxima: torch.Tensor | None
    best: torch.Tensor | None
    names: torch.Tensor | None
    best_blocks: torch.Tensor | None
    is_rounded: bool = False

    def launches(self, step: torch.Tensor, rows: int, max_rows: int) -> list[Launch]:
        """Two launches for the first `rows` rows, or three where there are several chunks."""
        heads, k, columns = self.weights.shape[1], self.chosen.shape[1], self.scores.shape[1]
        keys, codes, form = bytes_of(self.keys), RowCodes.of(self.keys), row_format_of(self.keys)
        group, limit = 0, 0
        if form is not None and form.rounds_queries and not self.is_rounded:
            group, limit = form.group, limit_bits(form)
        is_pooled = self.pool is not None
        pool = step if self.pool is None else self.pool
        maxima = self.scores if self.maxima is None else self.maxima
        turns = self.queries if self.turns is None else self.turns
        pairs = 0 if self.turns is None else turns.shape[1] // 2
        tile = COLUMNS if self.maxima is None else max(COLUMNS, self.block)
        is_wide = heads > MANY_HEADS  # of which scores take more registers
        if is_wide and self.maxima is None:
            tile //= 2
        block = max(1, self.block)
        found = [
            Launch(
                index_scores,
                (-(-columns // tile), rows),
                (self.queries, self.weights, keys, turns, pool, step, self.scores, maxima, columns,
                 heads, self.keys.shape[2], pairs, keys.stride(0), self.ratio, block,
                 self.blocks, self.factor, codes.step),
                {"POOLED": is_pooled, "MAXIMA": self.maxima is not None, "MAX": max_rows,
                 "HEADS": int(triton.next_power_of_2(max(LEAST_HEADS, heads))), "COLUMNS": tile,
                 "CHANNELS": CHANNELS if form is None and not is_wide else max(CHANNELS_OF_CODES, group),
                 "LIMIT_BITS": limit,
                 "BLOCK": block if self.maxima is not None else 1}
                | codes.constants,
                8 if is_wide else 4,
            )
        ]  # fmt: skip
        constants: dict[str, int | bool] = {"POOLED": is_pooled, "MAX": max_rows, "TILE": TILE}
        chunks = chunks_of(columns)
        scores, names = self.scores, step
        if self.best is not None and self.names is not None:
            scores, names = self.best, self.names
            arguments = (self.scores, step, scores, names, columns, self.ratio, k, chunks)
            found.append(Launch(chunk_best, (chunks, rows), arguments, constants, 8))
        best_blocks = self.chosen if self.best_blocks is None else self.best_blocks
        found.append(
            Launch(
                choose,
                (rows, 1 if self.best_blocks is None else 2),
                (scores, names, maxima, pool, step, self.chosen, best_blocks, columns, chunks, self.ratio, k,
                 block, self.blocks),
                constants | {"NAMED": self.best is not None},
                8,
            )
        )  # fmt: skip
        return found


def chunks_of(columns: int) -> int:
    """Chunks whose best are found side by side."""
    return -(-columns // TILE)
