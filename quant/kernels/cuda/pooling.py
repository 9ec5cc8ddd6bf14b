"""Triton: the projections of a row's token to its slot's rings, and the group that it completes, pooled.

Groups may overlap: then a token's projections are twice as wide, and the second halves of the group's own
are pooled with the first halves of the group before.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def of_token(
    fresh, by_position, ring, step, row, back, first, width, ratio, places, col, inside, MAX: tl.constexpr
):
    """Columns from `first` on of the projection of the token `back` before the row's: one of this step's
    rows, with its position's row of `by_position`, or what the slot's ring has of it."""
    other = tl.maximum(row - back, 0)
    position = tl.load(step + 1 + MAX + row) - back
    is_fresh = (row >= back) & (tl.load(step + 1 + other) == tl.load(step + 1 + row))
    is_fresh = is_fresh & (tl.load(step + 1 + MAX + other) == position)
    at = first + col
    found = tl.load(ring + position % places * width + at, mask=inside & (is_fresh == 0), other=0.0)
    found += tl.load(fresh + other * width + at, mask=inside & is_fresh, other=0.0)
    is_biased = inside & is_fresh & (by_position.to(tl.int64) != 0)
    return found + tl.load(by_position + position % ratio * width + at, mask=is_biased, other=0.0)


@triton.jit
def pool_group(
    x, gate, by_position, rows, gates, step, row, dim, ratio, overlaps, places, BLOCK: tl.constexpr,
    MAX: tl.constexpr,
):  # fmt: skip
    """`[BLOCK]`, columns of the pooled group of a row that is alive and completes one; else zeros.

    x, gate      `[rows, width]`, of `dim` columns, or of twice as many with `overlaps` 1, not 0
    by_position  `[ratio, width]`, added to gates: the row of the position modulo `ratio`; 0 for none
    rows, gates  rings of the row's slot, `[places, width]`
    """
    nothing = tl.full([], 0, tl.int64).to(tl.pointer_type(tl.float32))
    width = dim * (1 + overlaps)
    position = tl.load(step + 1 + MAX + row)
    is_alive = row < tl.load(step)
    col = tl.arange(0, BLOCK)
    inside = col < dim
    for half in range(0, 1 + overlaps):
        first = half * dim
        to = position % places * width + first + col
        value = of_token(x, nothing, rows, step, row, 0, first, width, ratio, places, col, inside, MAX)
        tl.store(rows + to, value, mask=inside & is_alive)
        value = of_token(
            gate, by_position, gates, step, row, 0, first, width, ratio, places, col, inside, MAX
        )
        tl.store(gates + to, value, mask=inside & is_alive)
    total = tl.zeros([BLOCK], tl.float32)
    if is_alive & ((position + 1) % ratio == 0):
        reach = tl.where(position >= ratio, ratio * (1 + overlaps), ratio)
        most = tl.full([BLOCK], float("-inf"), tl.float32)
        for back in range(0, reach):
            first = tl.where(back < ratio, overlaps * dim, 0)
            share = of_token(
                gate, by_position, gates, step, row, back, first, width, ratio, places, col, inside, MAX
            )
            most = tl.maximum(most, share)
        shares = tl.zeros([BLOCK], tl.float32)
        for back in range(0, reach):
            first = tl.where(back < ratio, overlaps * dim, 0)
            share = of_token(
                gate, by_position, gates, step, row, back, first, width, ratio, places, col, inside, MAX
            )
            share = tl.exp(share - most)
            value = of_token(x, nothing, rows, step, row, back, first, width, ratio, places, col, inside, MAX)
            shares += share
            total += share * value
        total = tl.where(inside, total / shares, 0.0)
    return total
