"""Triton: a row's attention over the last latents of its sequence and over chosen compressed entries.

All heads share a latent, which is key and value at once. The latents are divided among programs, which turn
their queries themselves; a second launch adds up what they found, and turns it back.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from quant.formats.rows import Rows, bytes_of
from quant.kernels.cuda.launch import Launch
from quant.kernels.cuda.row_codes import RowCodes, row_channels
from quant.kernels.cuda.row_tasks import turned
from quant.kernels.cuda.times import PRECISION

LATENTS = 32  # of a program
HEADS = 16  # of a program: what tensor cores take at least
CHANNELS = 64  # at a time


@triton.jit
def channels_of(q, at, first, dim, turns, pairs, CHANNELS: tl.constexpr):
    """Channels from `first` on of queries at `at` `[HEADS]`, turned: `[HEADS, CHANNELS]`."""
    channel = first + tl.arange(0, CHANNELS)
    inside = channel < dim
    values = tl.load(q + at[:, None] + channel[None, :], mask=inside[None, :], other=0.0)
    from_turned = channel - (dim - 2 * pairs)
    is_turned = (from_turned >= 0) & inside
    other = tl.load(q + at[:, None] + (channel ^ 1)[None, :], mask=is_turned[None, :], other=0.0)
    pair = from_turned // 2
    cosine = tl.load(turns + 2 * pair, mask=is_turned, other=1.0)
    sine = tl.load(turns + 2 * pair + 1, mask=is_turned, other=0.0)
    sine = tl.where(from_turned % 2 == 0, -sine, sine)
    return values * cosine[None, :] + other * sine[None, :]


@triton.jit
def attend_part(
    q, turns, rings, entries, chosen, step, parts, stats, heads, dim, pairs, window, places, ring_stride,
    choices, entry_stride, scale, place_step, entry_step,
    MAX: tl.constexpr, LATENTS: tl.constexpr, HEADS: tl.constexpr, CHANNELS: tl.constexpr,
    CODE: tl.constexpr, SCALE: tl.constexpr, GROUP: tl.constexpr, CODED: tl.constexpr,
    TAIL_AT: tl.constexpr, SCALES_AT: tl.constexpr,
    E_CODE: tl.constexpr, E_SCALE: tl.constexpr, E_GROUP: tl.constexpr, E_CODED: tl.constexpr,
    E_TAIL_AT: tl.constexpr, E_SCALES_AT: tl.constexpr,
):  # fmt: skip
    """parts `[rows, splits, heads, dim]` and stats `[rows, splits, heads, 2]`: a program's latents, weighted
    by e^(score - most), then `most` and the sum of weights. Grid (splits, blocks of heads, rows).

    The latents: `window` of the ring at the row's slot, then `choices` of its entries; rows of these are
    `place_step` and `entry_step` elements apart.
    """
    row, split = tl.program_id(2), tl.program_id(0)
    splits = tl.num_programs(0)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    slot, position = tl.load(step + 1 + row), tl.load(step + 1 + MAX + row)
    at = split * LATENTS + tl.arange(0, LATENTS)
    token = position + 1 - window + at
    in_ring = (at < window) & (token >= 0)
    ring_at = slot * ring_stride + token % places * place_step
    is_choice = (at >= window) & (at < window + choices) & (row < tl.load(step))  # of a row that is alive
    entry = tl.load(chosen + row * choices + at - window, mask=is_choice, other=-1)
    is_chosen = entry >= 0
    entry_at = slot * entry_stride + tl.maximum(entry, 0) * entry_step
    is_seen = in_ring | is_chosen
    query_at = (row * heads + tl.minimum(head, heads - 1)) * dim
    turn = turns + row * 2 * pairs
    scores = tl.zeros([HEADS, LATENTS], tl.float32)
    for first in range(0, dim, CHANNELS):
        queries = channels_of(q, query_at, first, dim, turn, pairs, CHANNELS)
        keys = row_channels(
            rings, ring_at, in_ring, first, dim, CODE, SCALE, GROUP, CODED, TAIL_AT, SCALES_AT, CHANNELS
        ) + row_channels(
            entries, entry_at, is_chosen, first, dim, E_CODE, E_SCALE, E_GROUP, E_CODED, E_TAIL_AT,
            E_SCALES_AT, CHANNELS,
        )  # fmt: skip
        scores = tl.dot(queries, tl.trans(keys), scores, input_precision=PRECISION)
    scores = tl.where(is_seen[None, :], scores * scale, float("-inf"))
    most = tl.max(scores, axis=1)
    base = tl.where(most == float("-inf"), 0.0, most)
    weights = tl.exp(scores - base[:, None])
    to = (row * splits + split) * heads + head
    inside = head < heads
    tl.store(stats + to * 2, most, mask=inside)
    tl.store(stats + to * 2 + 1, tl.sum(weights, axis=1), mask=inside)
    for first in range(0, dim, CHANNELS):
        values = row_channels(
            rings, ring_at, in_ring, first, dim, CODE, SCALE, GROUP, CODED, TAIL_AT, SCALES_AT, CHANNELS
        ) + row_channels(
            entries, entry_at, is_chosen, first, dim, E_CODE, E_SCALE, E_GROUP, E_CODED, E_TAIL_AT,
            E_SCALES_AT, CHANNELS,
        )  # fmt: skip
        found = tl.dot(weights, values, input_precision=PRECISION)
        channel = first + tl.arange(0, CHANNELS)
        mask = inside[:, None] & (channel < dim)[None, :]
        tl.store(parts + to[:, None] * dim + channel[None, :], found, mask=mask)


@triton.jit
def attend_sum(
    parts, stats, sink, turns, out, splits, heads, dim, pairs, BLOCK: tl.constexpr, SPLITS: tl.constexpr
):
    """out `[rows, heads, dim]` of parts and stats; the sink is a latent of zeros. Grid (heads, rows)."""
    head, row = tl.program_id(0), tl.program_id(1)
    split = tl.arange(0, SPLITS)
    at = (row * splits + split) * heads + head
    mosts = tl.load(stats + at * 2, mask=split < splits, other=float("-inf"))
    sums = tl.load(stats + at * 2 + 1, mask=split < splits, other=0.0)
    own = tl.load(sink + head)
    most = tl.maximum(tl.max(mosts, axis=0), own)
    total = tl.sum(sums * tl.exp(mosts - most), axis=0) + tl.exp(own - most)
    channel = tl.arange(0, BLOCK)
    found = tl.zeros([BLOCK], tl.float32)
    for n in range(0, splits):
        place = (row * splits + n) * heads + head
        share = tl.exp(tl.load(stats + place * 2) - most)
        found += share * tl.load(parts + place * dim + channel, mask=channel < dim, other=0.0)
    found = found / total
    if pairs > 0:
        found = turned(found, turns + row * 2 * pairs, dim, pairs, BLOCK)
    tl.store(out + (row * heads + head) * dim + channel, found, mask=channel < dim)


@dataclass(frozen=True)
class SparseAttention:
    """What a row attends to, and how it is turned.

    q, out      `[rows, heads * dim]`
    rings       `[slots, places, dim]`, of which the last `window` are seen
    sink        `[heads]`
    entries     `[slots, groups, dim]`, of which those chosen `[rows, choices]` are seen, -1 for none
    turns, back `[rows, 2 * pairs]`: of queries, and of what is found
    parts       `[rows, splits * heads * dim]`, stats `[rows, splits * heads * 2]`: for the first launch's
                results
    """

    q: torch.Tensor
    rings: Rows
    sink: torch.Tensor
    window: int
    entries: Rows | None
    chosen: torch.Tensor | None
    turns: torch.Tensor | None
    back: torch.Tensor | None
    parts: torch.Tensor
    stats: torch.Tensor
    out: torch.Tensor

    def launches(self, step: torch.Tensor, rows: int, max_rows: int) -> tuple[Launch, Launch]:
        """The two launches for the first `rows` rows."""
        _, places, dim = self.rings.shape
        heads = self.q.shape[1] // dim
        choices = 0 if self.chosen is None else self.chosen.shape[1]
        splits = splits_of(self.window, choices)
        entries = self.rings if self.entries is None else self.entries
        ring_codes, entry_codes = RowCodes.of(self.rings), RowCodes.of(entries, "E_")
        of_rings, of_entries = bytes_of(self.rings), bytes_of(entries)
        chosen = step if self.chosen is None else self.chosen
        turns = self.q if self.turns is None else self.turns
        back = self.q if self.back is None else self.back
        part = Launch(
            attend_part,
            (splits, -(-heads // HEADS), rows),
            (self.q, turns, of_rings, of_entries, chosen, step, self.parts, self.stats, heads, dim,
             0 if self.turns is None else turns.shape[1] // 2, self.window, places, of_rings.stride(0),
             choices, of_entries.stride(0), dim**-0.5, ring_codes.step, entry_codes.step),
            {"MAX": max_rows, "LATENTS": LATENTS, "HEADS": HEADS, "CHANNELS": CHANNELS}
            | ring_codes.constants | entry_codes.constants,
            4,
        )  # fmt: skip
        whole = Launch(
            attend_sum,
            (heads, rows),
            (self.parts, self.stats, self.sink, back, self.out, splits, heads, dim,
             0 if self.back is None else back.shape[1] // 2),
            {"BLOCK": int(triton.next_power_of_2(dim)), "SPLITS": int(triton.next_power_of_2(splits))},
            4,
        )  # fmt: skip
        return part, whole


def splits_of(window: int, choices: int) -> int:
    """Programs that share a row's latents."""
    return -(-(window + choices) // LATENTS)
