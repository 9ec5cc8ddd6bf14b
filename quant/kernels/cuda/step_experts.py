"""Triton: routed experts of a recorded step's rows, found by a table in the GPU's memory, in two launches.

For each pair of row and choice, the router has left the place of the expert's slot, or a negative number
where this GPU does not hold it; such a pair's programs stop at once. So nobody has to know which experts were
chosen. Another GPU that holds some of them fetches the rows that chose these, and runs the same two launches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from quant.errors import FormatError
from quant.kernels.cuda.decode import INT4, INT4_OFFSET, NF4, UNIT, four_bit_kind, nf4_levels
from quant.kernels.cuda.launch import Launch
from quant.kernels.cuda.linear import Blocks
from quant.kernels.cuda.times import times_vector
from quant.kernels.interface import ExpertExtras, ExpertWeights

FETCHED = 1024  # columns of a row that a program brings


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
def activated(gate, up, limit, alpha, shift):
    """g * sigmoid(alpha * g) * (clamp(up, -limit, limit) + shift), where g = min(gate, limit)."""
    gate = tl.minimum(gate, limit)
    return gate / (1.0 + tl.exp(-alpha * gate)) * (tl.minimum(tl.maximum(up, -limit), limit) + shift)


@triton.jit
def gate_up_of_slots(
    x, places, levels, inner, top_k, width, units, limit,
    w1_codes, w1_scales, w3_codes, w3_scales, ids, gate_bias, up_bias, alpha, shift,
    KIND: tl.constexpr, PER_SCALE: tl.constexpr, BLOCK_N: tl.constexpr, UNITS: tl.constexpr,
    BIASED: tl.constexpr,
):  # fmt: skip
    """inner `[pairs, width]` of x `[rows, hidden]`; grid (blocks of width, pairs). Four numbers say where
    in a slot the matrices are. Biases are `[experts, width]`."""
    pair = tl.program_id(1)
    place = tl.load(places + pair)
    if place >= 0:
        slot = tl.multiple_of(place, 16).to(tl.pointer_type(tl.uint8))
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
        if BIASED:
            first = tl.load(ids + pair) * width
            gate += tl.load(gate_bias + first + rows, mask=row_inside, other=0.0)
            up += tl.load(up_bias + first + rows, mask=row_inside, other=0.0)
        tl.store(inner + pair * width + rows, activated(gate, up, limit, alpha, shift), mask=row_inside)


@triton.jit
def down_of_slots(
    inner, places, levels, out, hidden, units, w2_codes, w2_scales, ids, bias,
    KIND: tl.constexpr, PER_SCALE: tl.constexpr, BLOCK_N: tl.constexpr, UNITS: tl.constexpr,
    BIASED: tl.constexpr,
):  # fmt: skip
    """out `[pairs, hidden]` of inner `[pairs, width]`; grid (blocks of hidden, pairs)."""
    pair = tl.program_id(1)
    place = tl.load(places + pair)
    if place >= 0:
        slot = tl.multiple_of(place, 16).to(tl.pointer_type(tl.uint8))
        rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        row_inside = rows < hidden
        total = times_vector(
            inner + pair * units * UNIT, slot + w2_codes, scales_at(slot + w2_scales, KIND), levels, rows,
            row_inside, units, KIND, PER_SCALE, BLOCK_N, UNITS,
        )  # fmt: skip
        if BIASED:
            total += tl.load(bias + tl.load(ids + pair) * hidden + rows, mask=row_inside, other=0.0)
        tl.store(out + pair * hidden + rows, total, mask=row_inside)


@triton.jit
def fetch_rows(
    places, x, table, mail_ids, mail_places, inputs, answerer, top_k, width,
    BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Of another GPU's choices `[rows, top_k]`, the places of those left to this answerer, -1 for others; and
    x `[rows, width]` of the rows that have some; grid (blocks of width, rows)."""
    row = tl.program_id(1)
    each = tl.arange(0, BLOCK_K)
    pair = row * top_k + each
    ident = tl.load(mail_ids + pair, mask=each < top_k, other=-1, volatile=True)
    left_to = tl.load(mail_places + pair, mask=each < top_k, other=0, volatile=True)
    is_ours = (ident >= 0) & (left_to == -1 - answerer)
    place = tl.load(table + ident, mask=is_ours, other=-1)
    if tl.program_id(0) == 0:
        tl.store(places + pair, place, mask=each < top_k)
    if tl.max(place, axis=0) >= 0:
        col = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        value = tl.load(inputs + row * width + col, mask=col < width, other=0.0, volatile=True)
        tl.store(x + row * width + col, value, mask=col < width)


def fetch_launch(
    table: torch.Tensor,
    ids: torch.Tensor,
    left_to: torch.Tensor,
    inputs: torch.Tensor,
    answerer: int,
    x: torch.Tensor,
    places: torch.Tensor,
    rows: int,
) -> Launch:
    """The launch that brings the first `rows` rows' share of a mailbox to this GPU.

    table         `[experts]` int64: where this GPU holds each
    ids, left_to  `[max_rows * top_k]` int64, of the mailbox; and its inputs `[max_rows, hidden]`
    x, places     `[rows, hidden]` and `[rows, top_k]`, to be filled
    """
    top_k, width = places.shape[1], x.shape[1]
    constants: dict[str, int | bool] = {"BLOCK_K": int(triton.next_power_of_2(top_k)), "BLOCK_N": FETCHED}
    arguments = (places, x, table, ids, left_to, inputs, answerer, top_k, width)
    return Launch(fetch_rows, (-(-width // FETCHED), rows), arguments, constants, 4)


@dataclass(frozen=True)
class SlotsOnGpu:
    """Where a GPU's experts are.

    places  `[layers, experts]` int64: addresses of slots, which lie in several allocations; negative for
            experts that are elsewhere
    sample  the weights of any slot, for their format, shapes and distances from the slot's begin
    begin   where that slot begins
    """

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
        ids: torch.Tensor,
        inner: torch.Tensor,
        apart: torch.Tensor,
        activation: tuple[float, ExpertExtras],
        rows: int,
    ) -> tuple[Launch, Launch]:
        """The launches that compute the chosen experts of the first `rows` rows of x `[rows, hidden]`.

        places, ids  `[rows, top_k]`, of the chosen experts
        activation  its limit, and what these experts have beyond that; biases in this GPU's memory
        inner   `[rows, top_k * width]`, for results on the way
        apart   `[rows, top_k * hidden]`, each choice's output, not weighted; unchanged where there is none
        """
        first = self.sample.w1
        width, hidden = first.shape
        top_k = places.shape[1]
        kind = four_bit_kind(first)
        assert kind is not None
        blocks = Blocks.of(1, torch.float32).on(x.device)
        constants: dict[str, int | bool] = {
            "KIND": kind,
            "PER_SCALE": first.format.tile_cols // UNIT.value,
            "BLOCK_N": blocks.rows,
            "UNITS": blocks.cols // UNIT.value,
        }
        levels = nf4_levels(x.device)
        limit, extras = activation
        biases = extras.biases
        gate_bias, up_bias, down_bias = (x, x, x) if biases is None else (biases.gate, biases.up, biases.down)
        constants["BIASED"] = biases is not None
        at = [place - self.begin for place in self.sample.addresses]
        up = Launch(
            gate_up_of_slots,
            (-(-width // blocks.rows), rows * top_k),
            (
                x,
                places,
                levels,
                inner,
                top_k,
                width,
                hidden // UNIT.value,
                limit,
                *at[:4],
                ids,
                gate_bias,
                up_bias,
                extras.alpha,
                extras.shift,
            ),
            constants,
            blocks.warps,
        )
        down = Launch(
            down_of_slots,
            (-(-hidden // blocks.rows), rows * top_k),
            (inner, places, levels, apart, hidden, width // UNIT.value, *at[4:], ids, down_bias),
            constants,
            blocks.warps,
        )
        return up, down
