"""Triton: a row's attention over latents of its sequence, as many as there are by now: all compressed entries
behind a window, or all that a layer has kept of its tokens, or those of them that were chosen.

All heads share a latent, which is the key and whose first columns are the value. A row's latents are divided
evenly among a fixed number of programs, which keep sums while they go through their part; `attend_sum` adds
up what they found. So neither time nor memory is taken for what a sequence does not have.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from quant.errors import FormatError
from quant.formats.rows import Rows, bytes_of
from quant.kernels.cuda.attention import attend_sum, channels_of
from quant.kernels.cuda.launch import Launch
from quant.kernels.cuda.row_codes import RowCodes, row_channels
from quant.kernels.cuda.times import PRECISION

LATENTS = 16  # at a time
HEADS = 16  # of a program: what tensor cores take at least
CHANNELS = 32  # at a time, of scores
VALUES = 128  # at a time, of what is summed up
MOST_VALUES = 4 * VALUES
SHARES = 64  # programs for each block of heads, of all rows together


@triton.jit
def store_values(parts, to, found, first, value_dim, inside, VALUES: tl.constexpr):
    """Columns from `first` on of what heads have found."""
    channel = first + tl.arange(0, VALUES)
    mask = inside[:, None] & (channel < value_dim)[None, :]
    tl.store(parts + to[:, None] * value_dim + channel[None, :], found, mask=mask)


@triton.jit
def latents_from(
    rings, entries, ring_at, entry_at, in_ring, is_entry, first, dim, WINDOWED: tl.constexpr,
    CODE: tl.constexpr, SCALE: tl.constexpr, GROUP: tl.constexpr, CODED: tl.constexpr,
    TAIL_AT: tl.constexpr, SCALES_AT: tl.constexpr,
    E_CODE: tl.constexpr, E_SCALE: tl.constexpr, E_GROUP: tl.constexpr, E_CODED: tl.constexpr,
    E_TAIL_AT: tl.constexpr, E_SCALES_AT: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Columns from `first` on of latents, of the ring or of entries: `[LATENTS, CHANNELS]`."""
    found = row_channels(
        entries, entry_at, is_entry, first, dim, E_CODE, E_SCALE, E_GROUP, E_CODED, E_TAIL_AT, E_SCALES_AT,
        CHANNELS,
    )  # fmt: skip
    if WINDOWED:
        found += row_channels(
            rings, ring_at, in_ring, first, dim, CODE, SCALE, GROUP, CODED, TAIL_AT, SCALES_AT, CHANNELS
        )
    return found


@triton.jit
def attend_latents(
    q, turns, rings, entries, chosen, step, parts, stats, heads, dim, value_dim, pairs, window, places,
    ring_stride, choices, every, entry_stride, scale, place_step, entry_step,
    WINDOWED: tl.constexpr, CHOSEN: tl.constexpr,
    MAX: tl.constexpr, LATENTS: tl.constexpr, HEADS: tl.constexpr, CHANNELS: tl.constexpr,
    VALUES: tl.constexpr, BLOCKS: tl.constexpr,
    CODE: tl.constexpr, SCALE: tl.constexpr, GROUP: tl.constexpr, CODED: tl.constexpr,
    TAIL_AT: tl.constexpr, SCALES_AT: tl.constexpr,
    E_CODE: tl.constexpr, E_SCALE: tl.constexpr, E_GROUP: tl.constexpr, E_CODED: tl.constexpr,
    E_TAIL_AT: tl.constexpr, E_SCALES_AT: tl.constexpr,
):  # fmt: skip
    """parts `[rows, splits, heads, value_dim]` and stats `[rows, splits, heads, 2]` as `attend_part` has
    them. Grid (splits, blocks of heads, rows).

    The latents: if WINDOWED, `window` of the ring at the row's slot; then of the slot's entries those that
    are CHOSEN `[rows, choices]`, or all that stand for `every` so many tokens. BLOCKS of VALUES columns are
    values.
    """
    row, split = tl.program_id(2), tl.program_id(0)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    slot = tl.load(step + 1 + row)
    is_alive = row < tl.load(step)  # if not, it has one token, whatever its position was
    position = tl.where(is_alive, tl.load(step + 1 + MAX + row), 0)
    if CHOSEN:
        seen = tl.where(is_alive, choices, 1)
    else:
        seen = ((position + 1) // every).to(tl.int32)
    total = window + seen
    share = tl.cdiv(tl.cdiv(total, tl.num_programs(0)), LATENTS) * LATENTS
    query_at = (row * heads + tl.minimum(head, heads - 1)) * dim
    turn = turns + row * 2 * pairs
    most = tl.full([HEADS], float("-inf"), tl.float32)
    sums = tl.zeros([HEADS], tl.float32)
    found_0 = tl.zeros([HEADS, VALUES], tl.float32)
    found_1 = tl.zeros([HEADS, VALUES], tl.float32)
    found_2 = tl.zeros([HEADS, VALUES], tl.float32)
    found_3 = tl.zeros([HEADS, VALUES], tl.float32)
    for begin in range(split * share, tl.minimum((split + 1) * share, total), LATENTS):
        at = begin + tl.arange(0, LATENTS)
        token = position + 1 - window + at
        in_ring = (at < window) & (token >= 0)
        ring_at = slot * ring_stride + tl.where(in_ring, token, 0) % places * place_step
        is_entry = (at >= window) & (at < total)
        entry = (at - window).to(tl.int64)
        if CHOSEN:
            entry = tl.load(chosen + row * choices + entry, mask=is_entry & is_alive, other=0)
            is_entry = is_entry & (entry >= 0)
        entry_at = slot * entry_stride + tl.where(is_entry, entry, 0) * entry_step
        scores = tl.zeros([HEADS, LATENTS], tl.float32)
        for first in range(0, dim, CHANNELS):
            queries = channels_of(q, query_at, first, dim, turn, pairs, CHANNELS)
            keys = latents_from(
                rings, entries, ring_at, entry_at, in_ring, is_entry, first, dim, WINDOWED,
                CODE, SCALE, GROUP, CODED, TAIL_AT, SCALES_AT,
                E_CODE, E_SCALE, E_GROUP, E_CODED, E_TAIL_AT, E_SCALES_AT, CHANNELS,
            )  # fmt: skip
            scores = tl.dot(queries, tl.trans(keys), scores, input_precision=PRECISION)
        scores = tl.where((in_ring | is_entry)[None, :], scores * scale, float("-inf"))
        larger = tl.maximum(most, tl.max(scores, axis=1))
        base = tl.where(larger == float("-inf"), 0.0, larger)
        kept = tl.exp(most - base)
        weights = tl.exp(scores - base[:, None])
        sums = sums * kept + tl.sum(weights, axis=1)
        most = larger
        for block in tl.static_range(BLOCKS):
            values = latents_from(
                rings, entries, ring_at, entry_at, in_ring, is_entry, block * VALUES, value_dim, WINDOWED,
                CODE, SCALE, GROUP, CODED, TAIL_AT, SCALES_AT,
                E_CODE, E_SCALE, E_GROUP, E_CODED, E_TAIL_AT, E_SCALES_AT, VALUES,
            )  # fmt: skip
            if block == 0:
                found_0 = tl.dot(weights, values, found_0 * kept[:, None], input_precision=PRECISION)
            elif block == 1:
                found_1 = tl.dot(weights, values, found_1 * kept[:, None], input_precision=PRECISION)
            elif block == 2:
                found_2 = tl.dot(weights, values, found_2 * kept[:, None], input_precision=PRECISION)
            else:
                found_3 = tl.dot(weights, values, found_3 * kept[:, None], input_precision=PRECISION)
    to = (row * tl.num_programs(0) + split) * heads + head
    inside = head < heads
    tl.store(stats + to * 2, most, mask=inside)
    tl.store(stats + to * 2 + 1, sums, mask=inside)
    store_values(parts, to, found_0, 0, value_dim, inside, VALUES)
    if BLOCKS > 1:
        store_values(parts, to, found_1, VALUES, value_dim, inside, VALUES)
    if BLOCKS > 2:
        store_values(parts, to, found_2, 2 * VALUES, value_dim, inside, VALUES)
    if BLOCKS > 3:
        store_values(parts, to, found_3, 3 * VALUES, value_dim, inside, VALUES)


@dataclass(frozen=True)
class LatentAttention:
    """What a row attends to, and how it is turned.

    q           `[rows, heads * dim]`
    out         `[rows, heads * value_dim]`
    rings       `[slots, places, dim]`, of which the last `window` are seen; None for none
    sink        `[heads]`
    entries     `[slots, entries, dim]`, of which those chosen `[rows, choices]` are seen, -1 for none; or all
                that stand for `every` so many tokens
    turns, back `[rows, 2 * pairs]`: of queries, and of what is found
    scale       of scores
    parts, stats  `[SHARES, heads * value_dim]` and `[SHARES, heads * 2]`: for the first launch's results
    """

    q: torch.Tensor
    rings: Rows | None
    sink: torch.Tensor
    window: int
    entries: Rows
    chosen: torch.Tensor | None
    every: int
    turns: torch.Tensor | None
    back: torch.Tensor | None
    scale: float
    parts: torch.Tensor
    stats: torch.Tensor
    out: torch.Tensor

    def launches(self, step: torch.Tensor, rows: int, max_rows: int) -> tuple[Launch, Launch]:
        """The two launches for the first `rows` rows."""
        _, count, dim = self.entries.shape
        heads = len(self.sink)
        value_dim = self.out.shape[1] // heads
        rings = self.entries if self.rings is None else self.rings
        ring_codes, entry_codes = RowCodes.of(rings), RowCodes.of(self.entries, "E_")
        of_rings, of_entries = bytes_of(rings), bytes_of(self.entries)
        chosen = step if self.chosen is None else self.chosen
        choices = 0 if self.chosen is None else self.chosen.shape[1]
        turns = self.q if self.turns is None else self.turns
        back = self.q if self.back is None else self.back
        most = self.window + (choices or count)
        splits = max(1, min(SHARES // rows, -(-most // LATENTS)))
        part = Launch(
            attend_latents,
            (splits, -(-heads // HEADS), rows),
            (self.q, turns, of_rings, of_entries, chosen, step, self.parts, self.stats, heads, dim, value_dim,
             0 if self.turns is None else turns.shape[1] // 2, self.window, rings.shape[1],
             of_rings.stride(0), choices, self.every, of_entries.stride(0), self.scale, ring_codes.step,
             entry_codes.step),
            {"WINDOWED": self.window > 0, "CHOSEN": self.chosen is not None, "MAX": max_rows,
             "LATENTS": LATENTS, "HEADS": HEADS, "CHANNELS": CHANNELS, "VALUES": VALUES,
             "BLOCKS": -(-value_dim // VALUES)}
            | ring_codes.constants | entry_codes.constants,
            8,
        )  # fmt: skip
        whole = Launch(
            attend_sum,
            (heads, rows),
            (self.parts, self.stats, self.sink, back, self.out, splits, heads, value_dim,
             0 if self.back is None else back.shape[1] // 2),
            {"BLOCK": int(triton.next_power_of_2(value_dim)), "SPLITS": int(triton.next_power_of_2(splits))},
            4,
        )  # fmt: skip
        return part, whole


def check_attends(rows: Rows | None, value_dim: int) -> None:
    """Raise FormatError for latents that no kernel reads."""
    if rows is not None:
        RowCodes.of(rows)
    if value_dim > MOST_VALUES:
        raise FormatError(f"values of {value_dim} channels are more than {MOST_VALUES}")
