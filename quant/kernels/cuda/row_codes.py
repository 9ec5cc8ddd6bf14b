"""Triton: rows of a cache as quant/formats/rows.py says they lie: encoded as they are stored, decoded where
they are read.

What a format says is constant for a kernel. Rows that are not encoded go through the same functions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from quant.errors import FormatError
from quant.formats.rows import CODES, LARGEST, SCALES, EncodedRows, RowFormat, Rows, bytes_of, row_format_of
from quant.kernels.cuda.decode import ue8m0
from quant.kernels.cuda.launch import Launch

# `CODES` and `SCALES` by number; EXACT: float32.
BF16: tl.constexpr = tl.constexpr(0)
E4M3: tl.constexpr = tl.constexpr(1)
E2M1: tl.constexpr = tl.constexpr(2)
INT8: tl.constexpr = tl.constexpr(3)
EXACT: tl.constexpr = tl.constexpr(4)
POWERS: tl.constexpr = tl.constexpr(0)
OF_E4M3: tl.constexpr = tl.constexpr(1)
FLOATS: tl.constexpr = tl.constexpr(2)


@dataclass(frozen=True)
class RowCodes:
    """A format as kernels take it.

    step        elements from a row to the next: floats, or bytes of encoded rows
    constants   by their names in kernels
    """

    step: int
    constants: dict[str, int | bool]

    @classmethod
    def of(cls, rows: Rows, prefix: str = "") -> RowCodes:
        """Those of rows; names of constants begin with `prefix`. Raises FormatError for a format that kernels
        do not read."""
        form = row_format_of(rows)
        if form is None:
            numbers = {"CODE": EXACT.value, "SCALE": 0, "GROUP": 1, "CODED": 0, "TAIL_AT": 0, "SCALES_AT": 0}
            return cls(rows.shape[-1], {prefix + name: number for name, number in numbers.items()})
        check_has_kernels(form)
        tail_at = form.code_bytes
        numbers = {
            "CODE": CODES.index(form.code), "SCALE": SCALES.index(form.scale), "GROUP": form.group,
            "CODED": form.coded, "TAIL_AT": tail_at, "SCALES_AT": tail_at + 2 * form.tail,
        }  # fmt: skip
        return cls(form.row_bytes, {prefix + name: number for name, number in numbers.items()})


def check_has_kernels(form: RowFormat) -> None:
    """Raises FormatError for a format that kernels do not read or write."""
    scales_at = form.code_bytes + 2 * form.tail
    if form.turned:
        raise FormatError("no kernel turns index queries by a Hadamard matrix")
    if form.coded and (form.group & (form.group - 1) or form.coded % 2):
        raise FormatError(f"no kernel reads KV rows with a scale for each {form.group} columns")
    if form.coded and form.scale == "float32" and scales_at % 4:
        raise FormatError("scales of KV rows do not begin at a multiple of four bytes")


@triton.jit
def from_e4m3(code):
    """Values of e4m3 codes, without NaN."""
    code = code.to(tl.int32)
    magnitude, mantissa = code & 127, code & 7
    normal = ((magnitude << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    value = tl.where(magnitude < 8, mantissa.to(tl.float32) * 0.001953125, normal)
    return tl.where(code >= 128, -value, value)


@triton.jit
def to_e4m3(value):
    """Codes of values, to the nearest, ties to even, of at most 448: int32."""
    bits = value.to(tl.int32, bitcast=True)
    magnitude = tl.minimum(bits & 0x7FFFFFFF, 0x43E00000)
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - 960
    shifted = magnitude.to(tl.float32, bitcast=True) + 16384.0
    small = shifted.to(tl.int32, bitcast=True) & 15
    return tl.where(magnitude < 0x3C800000, small, normal) | ((bits >> 24) & 128)


@triton.jit
def to_e2m1(value):
    """Codes of values, to the nearest, ties to even, of at most 6: int32."""
    magnitude = tl.abs(value)
    scale = tl.where(magnitude < 2, 2.0, tl.where(magnitude < 4, 1.0, 0.5))
    first = tl.where(magnitude < 2, 0.0, tl.where(magnitude < 4, 2.0, 4.0))
    code = tl.minimum((magnitude * scale + 12582912.0) - 12582912.0 + first, 7.0).to(tl.int32)
    return tl.where((code > 0) & (value < 0), code | 8, code)


@triton.jit
def from_e2m1(code):
    """Values of e2m1 codes, int32."""
    magnitude = code & 7
    power = (((magnitude >> 1) + 126) << 23) | ((magnitude & 1) << 22)
    value = tl.where(magnitude < 2, magnitude.to(tl.float32) * 0.5, power.to(tl.float32, bitcast=True))
    return tl.where(code >= 8, -value, value)


@triton.jit
def covering_power(largest, LIMIT_BITS: tl.constexpr):
    """The ue8m0 code of the smallest power of two that times the limit is at least `largest`: int32."""
    bits = largest.to(tl.int32, bitcast=True)
    above = (bits & 0x7FFFFF) > (LIMIT_BITS & 0x7FFFFF)
    code = (bits >> 23) - (LIMIT_BITS >> 23) + above.to(tl.int32) + 127
    return tl.where(bits == 0, 253 - (LIMIT_BITS >> 23), tl.maximum(code, 0))


@triton.jit
def rounded(
    values, CODE: tl.constexpr, GROUP: tl.constexpr, LIMIT_BITS: tl.constexpr, CHANNELS: tl.constexpr
):
    """Channels `[N, CHANNELS]` as they are after e2m1 or e4m3 with a power of two per GROUP of them."""
    groups = tl.reshape(values, (values.shape[0] * CHANNELS // GROUP, GROUP))
    scale = ue8m0(covering_power(tl.max(tl.abs(groups), axis=1), LIMIT_BITS))[:, None]
    scaled = tl.div_rn(groups, scale + tl.zeros_like(groups))
    if CODE == E2M1:
        scaled = from_e2m1(to_e2m1(scaled))
    else:
        scaled = from_e4m3(to_e4m3(scaled))
    return tl.reshape(scaled * scale, (values.shape[0], CHANNELS))


@triton.jit
def round_heads(
    x, out, width, CODE: tl.constexpr, GROUP: tl.constexpr, LIMIT_BITS: tl.constexpr, BLOCK: tl.constexpr
):
    """Heads of `width` columns, as they are after `rounded`. Grid (heads, rows)."""
    at = (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)) * width + tl.arange(0, BLOCK)
    inside = tl.arange(0, BLOCK) < width
    values = tl.reshape(tl.load(x + at, mask=inside, other=0.0), (1, BLOCK))
    values = rounded(values, CODE, GROUP, LIMIT_BITS, BLOCK)
    tl.store(out + at, tl.reshape(values, (BLOCK,)), mask=inside)


@triton.jit
def row_scales(
    rows, at, is_row, first, SCALE: tl.constexpr, CODED: tl.constexpr, GROUP: tl.constexpr,
    SCALES_AT: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """Scales of COUNT groups from number `first` on of rows: `[N, COUNT]`."""
    group = first + tl.arange(0, COUNT)
    inside = is_row[:, None] & (group * GROUP < CODED)[None, :]
    if SCALE == FLOATS:
        floats = rows.to(tl.pointer_type(tl.float32))
        return tl.load(floats + (at[:, None] + SCALES_AT) // 4 + group[None, :], mask=inside, other=0.0)
    byte = tl.load(rows + at[:, None] + SCALES_AT + group[None, :], mask=inside, other=0)
    return ue8m0(byte) if SCALE == POWERS else from_e4m3(byte)


@triton.jit
def row_channels(
    rows, at, is_row, first, dim,
    CODE: tl.constexpr, SCALE: tl.constexpr, GROUP: tl.constexpr, CODED: tl.constexpr,
    TAIL_AT: tl.constexpr, SCALES_AT: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Channels from `first` on of rows that begin at elements `at` `[N]`: `[N, CHANNELS]`, zeros for none."""
    channel = first + tl.arange(0, CHANNELS)
    inside = is_row[:, None] & (channel < dim)[None, :]
    if CODE == EXACT:
        values = tl.load(rows + at[:, None] + channel[None, :], mask=inside, other=0.0)
    else:
        values = tl.zeros([at.shape[0], CHANNELS], tl.float32)
        if CODED > 0:
            is_code = inside & (channel < CODED)[None, :]
            if CODE == E2M1:
                byte = tl.load(rows + at[:, None] + (channel // 2)[None, :], mask=is_code, other=0)
                value = from_e2m1((byte.to(tl.int32) >> (channel % 2 * 4)[None, :]) & 15)
            else:
                byte = tl.load(rows + at[:, None] + channel[None, :], mask=is_code, other=0)
                if CODE == E4M3:
                    value = from_e4m3(byte)
                else:
                    value = byte.to(tl.int8, bitcast=True).to(tl.float32)
            if GROUP >= CHANNELS:
                scale = row_scales(rows, at, is_row, first // GROUP, SCALE, CODED, GROUP, SCALES_AT, 1)
                value = value * scale
            else:
                scale = row_scales(
                    rows, at, is_row, first // GROUP, SCALE, CODED, GROUP, SCALES_AT, CHANNELS // GROUP
                )
                groups = tl.reshape(value, (at.shape[0], CHANNELS // GROUP, GROUP)) * scale[:, :, None]
                value = tl.reshape(groups, (at.shape[0], CHANNELS))
            values = tl.where(is_code, value, 0.0)
        place = at[:, None] + TAIL_AT + 2 * (channel - CODED)[None, :]
        is_tail = inside & (channel >= CODED)[None, :]
        low = tl.load(rows + place, mask=is_tail, other=0).to(tl.int32)
        high = tl.load(rows + place + 1, mask=is_tail, other=0).to(tl.int32)
        tail = ((low | (high << 8)) << 16).to(tl.float32, bitcast=True)
        values = tl.where(is_tail, tail, values)
    return values


@triton.jit
def encode_rows(
    x, state, step, dim, places, stride, head_stride, row_bytes, ratio, groups,
    MAX: tl.constexpr, CODE: tl.constexpr, SCALE: tl.constexpr, GROUP: tl.constexpr, CODED: tl.constexpr,
    TAIL_AT: tl.constexpr, SCALES_AT: tl.constexpr, BLOCK: tl.constexpr, LIMIT: tl.constexpr,
    LIMIT_BITS: tl.constexpr,
):  # fmt: skip
    """Rows of x `[rows, heads, dim]` to the bytes of their slots: to the ring of `places`, or, where there
    are none, to the entry of the group of `ratio` tokens that a row's token completes. Grid (rows, heads)."""
    row, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    position = tl.load(step + 1 + MAX + row)
    place = position % tl.maximum(places, 1)
    is_alive = row < tl.load(step)
    if places == 0:
        place = position // ratio
        is_alive = is_alive & ((position + 1) % ratio == 0)
    if is_alive:
        to = state + tl.load(step + 1 + row) * stride + head * head_stride + place * row_bytes
        col = tl.arange(0, BLOCK)
        values = tl.load(x + (row * tl.num_programs(1) + head) * dim + col, mask=col < dim, other=0.0)
        if CODED > 0:
            coded = tl.reshape(tl.where(col < CODED, values, 0.0), (BLOCK // GROUP, GROUP))
            largest = tl.max(tl.abs(coded), axis=1)
            group = tl.arange(0, BLOCK // GROUP)
            if SCALE == POWERS:
                code = covering_power(largest, LIMIT_BITS)
                tl.store(to + SCALES_AT + group, code.to(tl.uint8), mask=group < groups)
                scale = ue8m0(code)
            elif SCALE == OF_E4M3:
                code = to_e4m3(tl.div_rn(largest, LIMIT + tl.zeros_like(largest)))
                tl.store(to + SCALES_AT + group, code.to(tl.uint8), mask=group < groups)
                scale = from_e4m3(code)
            else:
                scale = tl.maximum(tl.div_rn(largest, LIMIT + tl.zeros_like(largest)), 1.1754943508222875e-38)
                floats = (to + SCALES_AT).to(tl.pointer_type(tl.float32))
                tl.store(floats + group, scale, mask=group < groups)
            by = tl.broadcast_to(scale[:, None], (BLOCK // GROUP, GROUP))
            scaled = tl.where(by == 0, 0.0, tl.div_rn(coded, tl.where(by == 0, 1.0, by)))
            if CODE == E2M1:
                low, high = tl.split(tl.reshape(to_e2m1(scaled), (BLOCK // 2, 2)))
                half = tl.arange(0, BLOCK // 2)
                tl.store(to + half, (low | (high << 4)).to(tl.uint8), mask=half < CODED // 2)
            else:
                if CODE == E4M3:
                    codes = to_e4m3(scaled)
                else:
                    whole = (scaled + 12582912.0) - 12582912.0
                    codes = tl.minimum(tl.maximum(whole, -127.0), 127.0).to(tl.int32)
                tl.store(to + col, tl.reshape(codes, (BLOCK,)).to(tl.uint8), mask=col < CODED)
        bits = values.to(tl.int32, bitcast=True)
        upper = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        is_tail = (col >= CODED) & (col < dim)
        tail = to + TAIL_AT + 2 * (col - CODED)
        tl.store(tail, (upper & 255).to(tl.uint8), mask=is_tail)
        tl.store(tail + 1, ((upper >> 8) & 255).to(tl.uint8), mask=is_tail)


def round_launch(x: torch.Tensor, form: RowFormat, out: torch.Tensor, rows: int) -> Launch:
    """The launch that rounds heads of the first `rows` rows as index queries of keys in this format."""
    constants: dict[str, int | bool] = {
        "CODE": CODES.index(form.code), "GROUP": form.group, "LIMIT_BITS": limit_bits(form),
        "BLOCK": max(int(triton.next_power_of_2(form.dim)), form.group),
    }  # fmt: skip
    return Launch(round_heads, (x.shape[1] // form.dim, rows), (x, out, form.dim), constants, 4)


def limit_bits(form: RowFormat) -> int:
    """The bits of a format's largest code as a float."""
    return int(torch.tensor(LARGEST.get(form.code, 1.0)).view(torch.int32))


def encode_launch(
    x: torch.Tensor, state: EncodedRows, step: torch.Tensor, rows: int, max_rows: int, ratio: int | None
) -> Launch:
    """The launch that stores the first `rows` rows of x `[rows, heads * dim]` in `state` `[slots, (heads,)
    places, dim]`: in rings, or as entries of `ratio` tokens each."""
    form, codes = state.format, RowCodes.of(state)
    constants = codes.constants | {
        "MAX": max_rows, "BLOCK": max(int(triton.next_power_of_2(form.dim)), form.group),
        "LIMIT": int(LARGEST.get(form.code, 1.0)), "LIMIT_BITS": limit_bits(form),
    }  # fmt: skip
    kept = bytes_of(state)
    places, heads = kept.shape[-2] if ratio is None else 0, x.shape[1] // form.dim
    arguments = (
        x, kept, step, form.dim, places, kept.stride(0), kept.stride(1) if kept.dim() == 4 else 0,
        form.row_bytes, ratio or 1, form.groups,
    )  # fmt: skip
    return Launch(encode_rows, (rows, heads), arguments, constants, 4)
