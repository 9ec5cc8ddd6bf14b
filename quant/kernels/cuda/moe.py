"""Triton: a layer's routed experts in two launches, wherever their slots are.

Pairs (token, choice) are sorted by expert and cut into tiles of at most BLOCK_M pairs of one expert, so
that each expert's bytes are read once for each tile. The first launch computes gate, up and the clamped
SwiGLU of every pair, the second the down projection times the router's weight; the choices of a token
are then added in their order, so results do not depend on the order in which programs finish. Of many pairs,
the second launch is made for some columns at a time, so that their outputs take bounded memory.

Weights are addressed by their distance in bytes from one of them, since slots of one arena are far apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

from quant.errors import FormatError
from quant.kernels.cuda.decode import (
    INT4,
    INT4_OFFSET,
    NF4,
    UNIT,
    WORD_BYTES,
    check_reachable,
    four_bit_kind,
    nf4_levels,
)
from quant.kernels.cuda.launch import Launch
from quant.kernels.cuda.linear import Blocks, four_bit_constants
from quant.kernels.cuda.times import times_matrix, times_two_matrices, times_vector
from quant.kernels.interface import ExpertWeights, MoeCall

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
    units,
    limit,
    KIND: tl.constexpr,
    PER_SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UNITS: tl.constexpr,
    IN_PARTS: tl.constexpr,
    ALIGNED: tl.constexpr,
    SHARES_X: tl.constexpr,
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
        token = x + (pair // top_k) * units * UNIT
        gate = times_vector(
            token, w1_codes, w1_scales, levels, rows, row_inside, units, KIND, PER_SCALE, BLOCK_N, UNITS
        )
        up = times_vector(
            token, w3_codes, w3_scales, levels, rows, row_inside, units, KIND, PER_SCALE, BLOCK_N, UNITS
        )
        value = swiglu(gate, up, limit).to(inner.dtype.element_ty)
        tl.store(inner + pair * width + rows, value, mask=row_inside)
    else:
        place = start + tl.arange(0, BLOCK_M)
        inside = place < stop
        pair = tl.load(pairs + place, mask=inside, other=0)
        if SHARES_X:
            gate, up = times_two_matrices(
                x, pair // top_k, inside, w1_codes, w1_scales, w3_codes, w3_scales, levels, rows, row_inside,
                units, KIND, PER_SCALE, BLOCK_M, BLOCK_N, UNITS, IN_PARTS,
            )  # fmt: skip
        else:
            gate = times_matrix(
                x, pair // top_k, inside, w1_codes, w1_scales, levels, rows, row_inside, units,
                KIND, PER_SCALE, BLOCK_M, BLOCK_N, UNITS, IN_PARTS,
            )  # fmt: skip
            up = times_matrix(
                x, pair // top_k, inside, w3_codes, w3_scales, levels, rows, row_inside, units,
                KIND, PER_SCALE, BLOCK_M, BLOCK_N, UNITS, IN_PARTS,
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
    first,
    last,
    units,
    KIND: tl.constexpr,
    PER_SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UNITS: tl.constexpr,
    IN_PARTS: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """out `[tokens * top_k, last - first]` float32: columns first to last of each pair's expert output, times
    its weight; grid (blocks of these columns, tiles)."""
    tile = tiles + tl.program_id(1) * 3
    expert, start, stop = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    codes, scales = weight_at(base, places, expert * 6 + 4, KIND, ALIGNED)
    rows = first + tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_inside = rows < last
    out -= first
    if BLOCK_M == 1:
        pair = tl.load(pairs + start)
        vector = inner + pair * units * UNIT
        total = times_vector(
            vector, codes, scales, levels, rows, row_inside, units, KIND, PER_SCALE, BLOCK_N, UNITS
        )
        tl.store(out + pair * (last - first) + rows, total * tl.load(expert_weights + pair), mask=row_inside)
    else:
        place = start + tl.arange(0, BLOCK_M)
        inside = place < stop
        pair = tl.load(pairs + place, mask=inside, other=0)
        total = times_matrix(
            inner, pair, inside, codes, scales, levels, rows, row_inside, units,
            KIND, PER_SCALE, BLOCK_M, BLOCK_N, UNITS, IN_PARTS,
        )  # fmt: skip
        total *= tl.load(expert_weights + pair, mask=inside, other=0.0)[:, None]
        at = out + pair[:, None] * (last - first) + rows[None, :]
        tl.store(at, total, mask=inside[:, None] & row_inside[None, :])


@dataclass(frozen=True)
class Schedule:
    """Which pairs go to which expert, in tiles.

    experts   the experts in use, ascending
    pairs     `[tokens * top_k]` int64: numbers token * top_k + choice, sorted by expert
    tiles     `[tiles, 3]` int64: index into `experts`, first and last (exclusive) index into `pairs`
    blocks    what a program computes; `blocks.tokens` is how many pairs a tile has at most
    """

    experts: list[int]
    pairs: npt.NDArray[np.int64]
    tiles: npt.NDArray[np.int64]
    blocks: Blocks


def schedule(expert_ids: torch.Tensor, dtype: torch.dtype) -> Schedule:
    """Tiles for `expert_ids` `[tokens, top_k]` and activations of `dtype`.

    Made on the CPU, which needs the expert ids anyway to find the experts.
    """
    flat = expert_ids.flatten().cpu().numpy()
    pairs = flat.argsort(kind="stable")
    by_expert = flat[pairs]
    starts = [0, *(np.flatnonzero(by_expert[1:] != by_expert[:-1]) + 1).tolist()]
    stops = [*starts[1:], len(flat)]
    blocks = Blocks.of(max(map(int.__sub__, stops, starts)), dtype)
    tiles = [
        (index, first, min(first + blocks.tokens, stop))
        for index, (start, stop) in enumerate(zip(starts, stops, strict=True))
        for first in range(start, stop, blocks.tokens)
    ]
    return Schedule(by_expert[starts].tolist(), pairs, np.array(tiles), blocks)


@dataclass(frozen=True)
class MoeLaunches:
    """Launches of a call.

    gate_up  what all pairs have between their matrices
    down     fills out `[tokens * top_k, last - first]` float32 with columns first to last of each pair's
             weighted output
    """

    gate_up: Launch
    down: Callable[[torch.Tensor, int, int], Launch]


def moe_launches(call: MoeCall, plan: Schedule) -> MoeLaunches:
    """Launches that compute a call's pairs.

    Raises FormatError if experts are in a format without a kernel, or in different formats.
    """
    x, expert_weights = call.x.contiguous(), call.expert_weights.float().contiguous()
    chosen = [call.experts[expert] for expert in plan.experts]
    first = chosen[0].w1
    base, distances, is_aligned = _places(chosen)
    width, hidden = first.shape
    top_k = call.expert_ids.shape[1]
    inner = x.new_empty(call.expert_ids.numel(), width)
    places, tiles, pairs = _together(x.device, distances, plan.tiles, plan.pairs)
    levels = nf4_levels(x.device)
    constants = four_bit_constants(x, first, plan.blocks) | {"ALIGNED": is_aligned}
    rows = plan.blocks.rows
    gate_up = Launch(
        moe_gate_up,
        (-(-width // rows), len(plan.tiles)),
        (x, base, places, tiles, pairs, levels, inner, top_k, width, hidden // UNIT.value, call.swiglu_limit),
        constants | {"SHARES_X": plan.blocks.shares_x},
        plan.blocks.warps,
    )

    def down(out: torch.Tensor, first: int, last: int) -> Launch:
        return Launch(
            moe_down,
            (-(-(last - first) // rows), len(plan.tiles)),
            (
                inner, base, places, tiles, pairs, levels, expert_weights, out, first, last,
                width // UNIT.value,
            ),
            constants,
            plan.blocks.warps,
        )  # fmt: skip

    return MoeLaunches(gate_up, down)


def _places(chosen: list[ExpertWeights]) -> tuple[torch.Tensor, npt.NDArray[np.int64], bool]:
    """A tensor to count from, distances `[experts, 6]` in bytes, and whether all are aligned."""
    first = chosen[0].w1
    format_ = first.format
    if four_bit_kind(first) is None:
        raise FormatError(f"{format_.name}: no Triton kernel runs experts in this format")
    check_reachable(first)
    for expert in chosen:
        for weight in expert.matrices:
            if weight.format is not format_:
                raise FormatError(f"experts in {format_.name} and {weight.format.name} in one layer")
    addresses = np.array([expert.addresses for expert in chosen])
    distances = addresses - addresses[0, 0]
    if (addresses % WORD_BYTES).any():
        raise FormatError(f"{format_.name}: codes must begin at a multiple of {WORD_BYTES} bytes")
    return first.codes, distances, not (addresses % ALIGNMENT).any()


def _together(device: torch.device, *arrays: npt.NDArray[np.int64]) -> list[torch.Tensor]:
    """Arrays packed into one flat tensor on `device`, each aligned: one copy instead of several."""
    sizes = [-(-array.size // 2) * 2 for array in arrays]  # of 8 bytes each
    whole = np.zeros(sum(sizes), dtype=np.int64)
    at = 0
    for array, size in zip(arrays, sizes, strict=True):
        whole[at : at + array.size] = array.ravel()
        at += size
    return list(torch.from_numpy(whole).to(device, non_blocking=True).split(sizes))
