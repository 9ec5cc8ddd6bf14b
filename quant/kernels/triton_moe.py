"""Triton: a layer's routed experts in two launches, whatever slots their weights lie in.

Pairs (token, choice) are sorted by expert and cut into tiles of at most BLOCK_M pairs of one expert, so
that each expert's bytes are read once for each tile. The first launch computes gate, up and the clamped
SwiGLU of every pair, the second the down projection times the router's weight; the choices of a token
are then added in their order, so results do not depend on what order programs finish in.

Weights are addressed by their distance in bytes from one of them, since slots of one arena are far apart.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from quant.errors import FormatError
from quant.kernels import Experts, ExpertWeights
from quant.kernels.triton_decode import (
    INT4,
    INT4_OFFSET,
    NF4,
    check_reachable,
    four_bit_kind,
    nf4_levels,
)
from quant.kernels.triton_launch import Launch
from quant.kernels.triton_linear import Blocks, four_bit_constants, times_matrix, times_vector

PLACES = 6  # of an expert: codes and scales of w1, w3, w2
ALIGNMENT = 16


@triton.jit
def weight_at(base, places, which, KIND: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointers to codes and scales of the weight whose places are number `which` and the next."""
    codes_place, scales_place = tl.load(places + which), tl.load(places + which + 1)
    if ALIGNED:
        codes_place = tl.multiple_of(codes_place, 16)
        scales_place = tl.multiple_of(scales_place, 16)
    codes, scales = base + codes_place, base + scales_place
    if KIND == NF4:
        return codes, scales.to(tl.pointer_type(tl.float32))
    elif KIND == INT4 or KIND == INT4_OFFSET:
        return codes, scales.to(tl.pointer_type(tl.bfloat16))
    else:
        return codes, scales


@triton.jit
def swiglu(gate, up, limit):
    """silu(min(gate, limit)) * clamp(up, -limit, limit)."""
    gate = tl.minimum(gate, limit)
    return gate / (1.0 + tl.exp(-gate)) * tl.minimum(tl.maximum(up, -limit), limit)


@triton.jit
def moe_gate_up(
    x,
    base,
    places,
    tiles,
    pairs,
    levels,
    inner,
    top_k,
    width,
    groups,
    limit,
    KIND: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUPS: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """inner `[tokens * top_k, width]` from x `[tokens, hidden]`; grid (blocks of width, tiles)."""
    tile = tiles + tl.program_id(1) * 3
    expert, start, stop = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    w1_codes, w1_scales = weight_at(base, places, expert * 6, KIND, ALIGNED)
    w3_codes, w3_scales = weight_at(base, places, expert * 6 + 2, KIND, ALIGNED)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_inside = rows < width
    if BLOCK_M == 1:
        pair = tl.load(pairs + start)
        token = x + (pair // top_k) * groups * (2 * HALF)
        gate = times_vector(
            token, w1_codes, w1_scales, levels, rows, row_inside, groups, KIND, HALF, BLOCK_N, GROUPS
        )
        up = times_vector(
            token, w3_codes, w3_scales, levels, rows, row_inside, groups, KIND, HALF, BLOCK_N, GROUPS
        )
        value = swiglu(gate, up, limit).to(inner.dtype.element_ty)
        tl.store(inner + pair * width + rows, value, mask=row_inside)
    else:
        place = start + tl.arange(0, BLOCK_M)
        inside = place < stop
        pair = tl.load(pairs + place, mask=inside, other=0)
        gate = times_matrix(
            x, pair // top_k, inside, w1_codes, w1_scales, levels, rows, row_inside, groups,
            KIND, HALF, BLOCK_M, BLOCK_N, GROUPS,
        )  # fmt: skip
        up = times_matrix(
            x, pair // top_k, inside, w3_codes, w3_scales, levels, rows, row_inside, groups,
            KIND, HALF, BLOCK_M, BLOCK_N, GROUPS,
        )  # fmt: skip
        value = swiglu(gate, up, limit).to(inner.dtype.element_ty)
        at = inner + pair[:, None] * width + rows[None, :]
        tl.store(at, value, mask=inside[:, None] & row_inside[None, :])


@triton.jit
def moe_down(
    inner,
    base,
    places,
    tiles,
    pairs,
    levels,
    expert_weights,
    out,
    hidden,
    groups,
    KIND: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUPS: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """out `[tokens * top_k, hidden]` float32: each pair's expert output times its weight."""
    tile = tiles + tl.program_id(1) * 3
    expert, start, stop = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    codes, scales = weight_at(base, places, expert * 6 + 4, KIND, ALIGNED)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_inside = rows < hidden
    if BLOCK_M == 1:
        pair = tl.load(pairs + start)
        vector = inner + pair * groups * (2 * HALF)
        total = times_vector(
            vector, codes, scales, levels, rows, row_inside, groups, KIND, HALF, BLOCK_N, GROUPS
        )
        tl.store(out + pair * hidden + rows, total * tl.load(expert_weights + pair), mask=row_inside)
    else:
        place = start + tl.arange(0, BLOCK_M)
        inside = place < stop
        pair = tl.load(pairs + place, mask=inside, other=0)
        total = times_matrix(
            inner, pair, inside, codes, scales, levels, rows, row_inside, groups,
            KIND, HALF, BLOCK_M, BLOCK_N, GROUPS,
        )  # fmt: skip
        total *= tl.load(expert_weights + pair, mask=inside, other=0.0)[:, None]
        at = out + pair[:, None] * hidden + rows[None, :]
        tl.store(at, total, mask=inside[:, None] & row_inside[None, :])


@dataclass(frozen=True)
class Schedule:
    """Which pairs go to which expert, in tiles.

    experts   the experts in use, ascending
    pairs     `[tokens * top_k]` int32: numbers token * top_k + choice, sorted by expert
    tiles     `[tiles, 3]` int32: index into `experts`, first and last (exclusive) index into `pairs`
    blocks    what a program computes; `blocks.tokens` is how many pairs a tile has at most
    """

    experts: list[int]
    pairs: torch.Tensor
    tiles: torch.Tensor
    blocks: Blocks


def schedule(expert_ids: torch.Tensor, dtype: torch.dtype) -> Schedule:
    """Tiles for `expert_ids` `[tokens, top_k]` and activations of `dtype`.

    Made on the CPU, where the choice is needed anyway to find the experts.
    """
    flat = expert_ids.flatten().cpu()
    pairs = flat.argsort(stable=True)
    experts, counts = torch.unique_consecutive(flat[pairs], return_counts=True)
    blocks = Blocks.of(int(counts.max()), dtype)
    tiles = []
    start = 0
    for index, count in enumerate(counts.tolist()):
        tiles += [
            (index, first, min(first + blocks.tokens, start + count))
            for first in range(start, start + count, blocks.tokens)
        ]
        start += count
    return Schedule(experts.tolist(), pairs.int(), torch.tensor(tiles, dtype=torch.int32), blocks)


def moe_launches(
    x: torch.Tensor,
    plan: Schedule,
    expert_weights: torch.Tensor,
    experts: Experts,
    swiglu_limit: float,
    out: torch.Tensor,
) -> tuple[Launch, Launch]:
    """Launches that fill `out` `[tokens * top_k, hidden]` float32 with each pair's weighted output.

    Raises FormatError where experts are in a format without a kernel, or in different ones.
    """
    chosen = [experts[expert] for expert in plan.experts]
    first = chosen[0].w1
    base, places, is_aligned = _places(chosen)
    width, hidden = first.shape
    top_k = out.shape[0] // x.shape[0]
    inner = x.new_empty(out.shape[0], width)
    places, tiles, pairs = (t.to(x.device, non_blocking=True) for t in (places, plan.tiles, plan.pairs))
    levels = nf4_levels(x.device)
    constants = four_bit_constants(first, plan.blocks) | {"ALIGNED": is_aligned}
    group = first.format.tile_cols
    gate_up = Launch(
        moe_gate_up,
        (triton.cdiv(width, plan.blocks.rows), len(plan.tiles)),
        (x, base, places, tiles, pairs, levels, inner, top_k, width, hidden // group, swiglu_limit),
        constants,
        plan.blocks.warps,
    )
    down = Launch(
        moe_down,
        (triton.cdiv(hidden, plan.blocks.rows), len(plan.tiles)),
        (inner, base, places, tiles, pairs, levels, expert_weights, out, hidden, width // group),
        constants,
        plan.blocks.warps,
    )
    return gate_up, down


def _places(chosen: list[ExpertWeights]) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """A tensor to count from, distances `[experts, 6]` int64 in bytes, and whether all are aligned."""
    format_ = chosen[0].w1.format
    if four_bit_kind(chosen[0].w1) is None:
        raise FormatError(f"{format_.name}: no Triton kernel runs experts in it")
    base = chosen[0].w1.codes
    places = []
    for expert in chosen:
        for weight in (expert.w1, expert.w3, expert.w2):
            if weight.format is not format_:
                raise FormatError(f"experts in {format_.name} and {weight.format.name} in one layer")
            check_reachable(weight)
            assert weight.scales is not None
            places += [weight.codes.data_ptr() - base.data_ptr(), weight.scales.data_ptr() - base.data_ptr()]
    is_aligned = base.data_ptr() % ALIGNMENT == 0 and all(place % ALIGNMENT == 0 for place in places)
    return base, torch.tensor(places).view(-1, PLACES), is_aligned
