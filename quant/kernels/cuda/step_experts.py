"""Triton: routed experts of a recorded step's rows, found by a table in the GPU's memory, in two launches.

For each pair of row and choice, the router has left the place of the expert's slot, or -1 where this GPU does
not hold it; such a pair's programs stop at once. So nobody has to know which experts were chosen.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from quant.errors import FormatError
from quant.kernels.cuda.decode import INT4, INT4_OFFSET, NF4, UNIT, four_bit_kind, nf4_levels
from quant.kernels.cuda.launch import Launch
from quant.kernels.cuda.linear import Blocks, times_vector
from quant.kernels.cuda.moe import swiglu
from quant.kernels.cuda.products import INTERPRETED_ROWS
from quant.kernels.interface import ExpertWeights


@triton.jit
def scales_at(slot, KIND: tl.constexpr):
    """A pointer to scales of the format."""
    if KIND == NF4:
        return slot.to(tl.pointer_type(tl.float32))
    elif KIND == INT4 or KIND == INT4_OFFSET:
        return slot.to(tl.pointer_type(tl.bfloat16))
    else:
        return slot


@triton.jit
def gate_up_of_slots(
    x, arena, places, levels, inner, top_k, width, units, limit,
    w1_codes, w1_scales, w3_codes, w3_scales,
    KIND: tl.constexpr, PER_SCALE: tl.constexpr, BLOCK_N: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """inner `[pairs, width]` of x `[rows, hidden]`; grid (blocks of width, pairs). The last four numbers say
    where in a slot the matrices are."""
    pair = tl.program_id(1)
    place = tl.load(places + pair)
    if place >= 0:
        slot = arena + tl.multiple_of(place, 16)
        rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        row_inside = rows < width
        row = x + (pair // top_k) * units * UNIT
        gate = times_vector(
            row, slot + w1_codes, scales_at(slot + w1_scales, KIND), levels, rows, row_inside, units,
            KIND, PER_SCALE, BLOCK_N, UNITS,
        )  # fmt: skip
        up = times_vector(
            row, slot + w3_codes, scales_at(slot + w3_scales, KIND), levels, rows, row_inside, units,
            KIND, PER_SCALE, BLOCK_N, UNITS,
        )  # fmt: skip
        tl.store(inner + pair * width + rows, swiglu(gate, up, limit), mask=row_inside)


@triton.jit
def down_of_slots(
    inner, arena, places, levels, out, hidden, units, w2_codes, w2_scales,
    KIND: tl.constexpr, PER_SCALE: tl.constexpr, BLOCK_N: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """out `[pairs, hidden]` of inner `[pairs, width]`; grid (blocks of hidden, pairs)."""
    pair = tl.program_id(1)
    place = tl.load(places + pair)
    if place >= 0:
        slot = arena + tl.multiple_of(place, 16)
        rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        row_inside = rows < hidden
        total = times_vector(
            inner + pair * units * UNIT, slot + w2_codes, scales_at(slot + w2_scales, KIND), levels, rows,
            row_inside, units, KIND, PER_SCALE, BLOCK_N, UNITS,
        )  # fmt: skip
        tl.store(out + pair * hidden + rows, total, mask=row_inside)


@dataclass(frozen=True)
class SlotsOnGpu:
    """Where a GPU's experts are.

    arena   bytes, of which an expert's slot begins at its place
    places  `[layers, experts]` int64: bytes from the arena's begin; -1 for experts that are elsewhere
    sample  the weights of any slot, for their format, shapes and distances from the slot's begin
    begin   where that slot begins
    """

    arena: torch.Tensor
    places: torch.Tensor
    sample: ExpertWeights
    begin: int

    def check(self) -> None:
        """Raise FormatError for experts that no kernel here runs."""
        formats = {weight.format.name for weight in self.sample.matrices}
        if len(formats) > 1 or four_bit_kind(self.sample.w1) is None:
            raise FormatError(
                f"experts in {' and '.join(sorted(formats))}: no Triton kernel finds them by itself"
            )

    def launches(
        self,
        x: torch.Tensor,
        places: torch.Tensor,
        inner: torch.Tensor,
        apart: torch.Tensor,
        limit: float,
        rows: int,
    ) -> tuple[Launch, Launch]:
        """The launches that compute the chosen experts of the first `rows` rows of x `[rows, hidden]`.

        places  `[rows, top_k]`, of the chosen experts
        inner   `[rows, top_k * width]`, for results on the way
        apart   `[rows, top_k * hidden]`, each choice's output, not weighted; unchanged where there is none
        """
        first = self.sample.w1
        width, hidden = first.shape
        top_k = places.shape[1]
        kind = four_bit_kind(first)
        assert kind is not None
        blocks = Blocks.of(1, torch.float32)
        block_rows = blocks.rows if x.device.type in ("cuda", "meta") else INTERPRETED_ROWS
        constants: dict[str, int | bool] = {
            "KIND": kind,
            "PER_SCALE": first.format.tile_cols // UNIT.value,
            "BLOCK_N": block_rows,
            "UNITS": blocks.cols // UNIT.value,
        }
        levels = nf4_levels(x.device)
        at = [place - self.begin for place in self.sample.addresses]
        up = Launch(
            gate_up_of_slots,
            (-(-width // block_rows), rows * top_k),
            (x, self.arena, places, levels, inner, top_k, width, hidden // UNIT.value, limit, *at[:4]),
            constants,
            blocks.warps,
        )
        down = Launch(
            down_of_slots,
            (-(-hidden // block_rows), rows * top_k),
            (inner, self.arena, places, levels, apart, hidden, width // UNIT.value, *at[4:]),
            constants,
            blocks.warps,
        )
        return up, down
