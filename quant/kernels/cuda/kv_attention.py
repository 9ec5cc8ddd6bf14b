"""Triton: attention of a recorded step's rows over the keys and values that their slots hold.

Query heads that share a key head are one program's rows, so keys and values are read once for all of them.
The tokens that a row sees are divided among programs by its position, which is known only while the step
runs: each takes an equal share of whole blocks, and one that has none leaves nothing. A second launch adds up
what they found.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from quant.formats.rows import Rows, bytes_of
from quant.kernels.cuda.launch import Launch
from quant.kernels.cuda.row_codes import RowCodes, row_channels
from quant.kernels.cuda.times import PRECISION

TOKENS = 32  # of a block
HEADS = 16  # of a program: what tensor cores take at least
MOST_PARTS = 64  # programs that share what rows see of one key head


@triton.jit
def attend_kv_part(
    q, keys, values, step, parts, stats, heads, group, dim, window, places, slot_stride, head_stride,
    row_step, scale,
    MAX: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr,
    CODE: tl.constexpr, SCALE: tl.constexpr, GROUP: tl.constexpr, CODED: tl.constexpr,
    TAIL_AT: tl.constexpr, SCALES_AT: tl.constexpr,
):  # fmt: skip
    """parts `[rows, splits, heads, dim]` and stats `[rows, splits, heads, 2]`: a program's share of the
    tokens, weighted by e^(score - most), then `most` and the sum of weights. Grid (splits, blocks of heads,
    rows).

    A key head serves `group` query heads, of which a program takes HEADS at most. Rows are `row_step`
    elements apart. A row that is not alive sees nothing: what its slot had may have been given back.
    """
    split, row = tl.program_id(0), tl.program_id(2)
    splits = tl.num_programs(0)
    blocks = (group + HEADS - 1) // HEADS  # of a key head
    key_head = (tl.program_id(1) // blocks).to(tl.int64)
    member = tl.program_id(1) % blocks * HEADS + tl.arange(0, HEADS)
    inside = member < group
    head = key_head * group + tl.minimum(member, group - 1)
    start = tl.load(step + 1 + row) * slot_stride + key_head * head_stride
    last = tl.where(row < tl.load(step), tl.load(step + 1 + MAX + row) + 1, 0)
    first = tl.maximum(last - window, 0)
    count = tl.cdiv(tl.cdiv(last - first, splits), TOKENS) * TOKENS
    begin = first + split * count
    end = tl.minimum(begin + count, last)
    channel = tl.arange(0, DIM)
    at = (row * heads + head) * dim
    is_query = inside[:, None] & (channel < dim)[None, :]
    queries = tl.load(q + at[:, None] + channel[None, :], mask=is_query, other=0.0) * scale
    most = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    found = tl.zeros([HEADS, DIM], tl.float32)
    for block in range(begin, end, TOKENS):
        token = block + tl.arange(0, TOKENS)
        is_seen = token < end
        row_at = start + token % places * row_step
        key = row_channels(keys, row_at, is_seen, 0, dim, CODE, SCALE, GROUP, CODED, TAIL_AT, SCALES_AT, DIM)
        scores = tl.dot(queries, tl.trans(key), input_precision=PRECISION)
        scores = tl.where(is_seen[None, :], scores, float("-inf"))
        larger = tl.maximum(most, tl.max(scores, axis=1))
        weights = tl.exp(scores - larger[:, None])
        before = tl.exp(most - larger)
        value = row_channels(
            values, row_at, is_seen, 0, dim, CODE, SCALE, GROUP, CODED, TAIL_AT, SCALES_AT, DIM
        )
        found = tl.dot(weights, value, found * before[:, None], input_precision=PRECISION)
        total = total * before + tl.sum(weights, axis=1)
        most = larger
    to = (row * splits + split) * heads + head
    tl.store(stats + to * 2, most, mask=inside)
    tl.store(stats + to * 2 + 1, total, mask=inside)
    tl.store(parts + to[:, None] * dim + channel[None, :], found, mask=is_query)


@triton.jit
def attend_kv_sum(
    parts, stats, sinks, out, splits, heads, dim,
    HAS_SINKS: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out `[rows, heads, dim]` of parts and stats; a sink is a token of zeros. Grid (heads, rows)."""
    head, row = tl.program_id(0), tl.program_id(1)
    split = tl.arange(0, SPLITS)
    at = (row * splits + split) * heads + head
    mosts = tl.load(stats + at * 2, mask=split < splits, other=float("-inf"))
    sums = tl.load(stats + at * 2 + 1, mask=split < splits, other=0.0)
    most = tl.maximum(tl.max(mosts, axis=0), -1e30)  # of what sees nothing, too
    if HAS_SINKS:
        most = tl.maximum(most, tl.load(sinks + head))
    total = tl.sum(sums * tl.exp(mosts - most), axis=0)
    if HAS_SINKS:
        total += tl.exp(tl.load(sinks + head) - most)
    channel = tl.arange(0, BLOCK)
    found = tl.zeros([BLOCK], tl.float32)
    for n in range(0, splits):
        place = (row * splits + n) * heads + head
        share = tl.exp(tl.load(stats + place * 2) - most)
        found += share * tl.load(parts + place * dim + channel, mask=channel < dim, other=0.0)
    tl.store(out + (row * heads + head) * dim + channel, found / tl.maximum(total, 1e-30), mask=channel < dim)


@dataclass(frozen=True)
class KvAttention:
    """What a row attends to.

    q, out        `[rows, heads * dim]`
    keys, values  `[slots, kv_heads, places, dim]`, of one format: a token's row in the place of its position,
                  or of its remainder in a ring
    window        tokens that a row sees, itself the last; None for all
    sinks         `[heads]`: the denominator of head h gains exp(sinks_h)
    scale         of the scores
    parts         `[parts, heads * dim]`, stats `[parts, heads * 2]`: for the first launch's results
    """

    q: torch.Tensor
    keys: Rows
    values: Rows
    window: int | None
    sinks: torch.Tensor | None
    scale: float
    parts: torch.Tensor
    stats: torch.Tensor
    out: torch.Tensor

    def launches(self, step: torch.Tensor, rows: int, max_rows: int) -> tuple[Launch, Launch]:
        """The two launches for the first `rows` rows."""
        _, kv_heads, places, dim = self.keys.shape
        heads = self.q.shape[1] // dim
        group = heads // kv_heads
        splits = kv_splits(places, self.window, rows)
        codes, keys, values = RowCodes.of(self.keys), bytes_of(self.keys), bytes_of(self.values)
        block = int(triton.next_power_of_2(dim))
        part = Launch(
            attend_kv_part,
            (splits, kv_heads * -(-group // HEADS), rows),
            (self.q, keys, values, step, self.parts, self.stats, heads, group, dim, self.window or places,
             places, keys.stride(0), keys.stride(1), codes.step, self.scale),
            {"MAX": max_rows, "TOKENS": TOKENS, "HEADS": HEADS, "DIM": max(16, block)} | codes.constants,
            8 if codes.constants["CODED"] else 4,  # decoding takes registers
        )  # fmt: skip
        whole = Launch(
            attend_kv_sum,
            (heads, rows),
            (
                self.parts,
                self.stats,
                step if self.sinks is None else self.sinks,
                self.out,
                splits,
                heads,
                dim,
            ),
            {
                "HAS_SINKS": self.sinks is not None,
                "SPLITS": int(triton.next_power_of_2(splits)),
                "BLOCK": block,
            },
            4,
        )
        return part, whole


def kv_splits(places: int, window: int | None, rows: int) -> int:
    """Programs that share what a row sees of one key head: the fewer rows, the more."""
    return min(max(1, MOST_PARTS // rows), -(-min(places, window or places) // TOKENS))


def kv_parts(places: int, window: int | None, max_rows: int) -> int:
    """Results that they leave at most, for each query head."""
    return max(rows * kv_splits(places, window, rows) for rows in range(1, max_rows + 1))
