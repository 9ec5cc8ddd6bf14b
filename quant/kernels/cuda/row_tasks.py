"""Triton: small tasks of a recorded step that take one row each, as many of them in a launch as are ready.

A table in the GPU's memory has a line for each task: a vector normalised, turned and stored in a sequence's
state; a group of projections pooled; the mixes of a sublayer; the router's choice. A program does one row of
one task, and leaves what it does not need.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import triton
import triton.language as tl

from quant.kernels.cuda.launch import Launch
from quant.kernels.cuda.mailbox import Mail, leave_row
from quant.kernels.cuda.pooling import pool_group
from quant.kernels.cuda.routing import NO_ROUTING, chosen_experts, scores_of
from quant.kernels.cuda.streams import finish_mix, finish_reading

# Fields of a line, 28 numbers.
KIND: tl.constexpr = tl.constexpr(0)
X: tl.constexpr = tl.constexpr(1)
WEIGHT: tl.constexpr = tl.constexpr(2)
TURNS: tl.constexpr = tl.constexpr(3)
OUT: tl.constexpr = tl.constexpr(4)
STATE: tl.constexpr = tl.constexpr(5)
WIDTH: tl.constexpr = tl.constexpr(6)
PLACES: tl.constexpr = tl.constexpr(7)
STRIDE: tl.constexpr = tl.constexpr(8)
RATIO: tl.constexpr = tl.constexpr(9)
STORED: tl.constexpr = tl.constexpr(10)
PAIRS: tl.constexpr = tl.constexpr(11)
HEADS: tl.constexpr = tl.constexpr(12)
EPS: tl.constexpr = tl.constexpr(13)
GATE: tl.constexpr = tl.constexpr(14)
GATE_STATE: tl.constexpr = tl.constexpr(15)
SCALE: tl.constexpr = tl.constexpr(16)
BASE: tl.constexpr = tl.constexpr(17)
POST: tl.constexpr = tl.constexpr(18)
COMBINE: tl.constexpr = tl.constexpr(19)
SPLITS: tl.constexpr = tl.constexpr(20)
ITERATIONS: tl.constexpr = tl.constexpr(21)
NORM_EPS: tl.constexpr = tl.constexpr(22)
MAIL: tl.constexpr = tl.constexpr(23)
X_ROW: tl.constexpr = tl.constexpr(14)  # of a vector: from a row to the next, and from a head to the next
X_HEAD: tl.constexpr = tl.constexpr(15)
OUT_ROW: tl.constexpr = tl.constexpr(16)
OUT_HEAD: tl.constexpr = tl.constexpr(17)
STATE_ROW: tl.constexpr = tl.constexpr(18)
BIAS: tl.constexpr = tl.constexpr(19)
FACTOR: tl.constexpr = tl.constexpr(20)
HEAD_STRIDE: tl.constexpr = tl.constexpr(24)
LIMIT: tl.constexpr = tl.constexpr(25)
WHOLE: tl.constexpr = tl.constexpr(26)
FIELDS: tl.constexpr = tl.constexpr(28)

LATENT: tl.constexpr = tl.constexpr(0)
POOL: tl.constexpr = tl.constexpr(1)
MIX: tl.constexpr = tl.constexpr(2)
ROUTE: tl.constexpr = tl.constexpr(3)
ROTATIONS: tl.constexpr = tl.constexpr(4)
WEIGH: tl.constexpr = tl.constexpr(5)
READING: tl.constexpr = tl.constexpr(6)

NOWHERE, IN_RING, AS_ENTRY = 0, 1, 2  # what STORED says
MAX_SPLITS = 64
LANES: tl.constexpr = tl.constexpr(128)


@triton.jit
def floats_at(line, FIELD: tl.constexpr):
    """Where a field says that floats are."""
    return tl.load(line + FIELD).to(tl.pointer_type(tl.float32))


@triton.jit
def fraction(line, FIELD: tl.constexpr):
    """A float32 in a field."""
    return tl.load(line + FIELD).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def turned(values, turns, width, pairs, BLOCK: tl.constexpr):
    """values `[BLOCK]`, of which the last 2 * pairs of `width` are complex numbers, times turns `[pairs]`."""
    pair = tl.arange(0, BLOCK // 2) - (width // 2 - pairs)
    inside = (pair >= 0) & (pair < pairs)
    real, imaginary = tl.split(tl.reshape(values, (BLOCK // 2, 2)))
    cosine = tl.load(turns + 2 * pair, mask=inside, other=1.0)
    sine = tl.load(turns + 2 * pair + 1, mask=inside, other=0.0)
    both = tl.join(real * cosine - imaginary * sine, real * sine + imaginary * cosine)
    return tl.reshape(both, (BLOCK,))


@triton.jit
def row_norm(x, width, eps, BLOCK: tl.constexpr):
    """1 / the root mean square of a vector at x."""
    squares = tl.zeros([BLOCK], tl.float32)
    for first in range(0, width, BLOCK):
        col = first + tl.arange(0, BLOCK)
        value = tl.load(x + col, mask=col < width, other=0.0)
        squares += value * value
    return tl.rsqrt(tl.sum(squares, axis=0) / width + eps)


@triton.jit
def normalised(values, weight, col, inside, width, eps):
    """values `[BLOCK]`, zero outside, by their root mean square, times a weight where there is one."""
    values = values * tl.rsqrt(tl.sum(values * values, axis=0) / width + eps)
    return values * tl.load(weight + col, mask=inside, other=0.0)


@triton.jit
def latent(line, step, row, head, BLOCK: tl.constexpr, MAX: tl.constexpr):
    """A head of a row, times a factor: normalised if there is a weight, by itself or with the WHOLE row, with
    a bias added and cut to a limit if there is one, turned if there are turns; to a buffer, to the place of
    its position in its slot, or, where its token completes a group, to its place among the slot's entries."""
    width = tl.load(line + WIDTH).to(tl.int32)
    heads = tl.load(line + HEADS).to(tl.int32)
    if head < heads:
        col = tl.arange(0, BLOCK)
        inside = col < width
        x = floats_at(line, X) + row * tl.load(line + X_ROW) + head * tl.load(line + X_HEAD)
        values = tl.load(x + col, mask=inside, other=0.0) * fraction(line, FACTOR)
        if tl.load(line + WEIGHT) != 0:
            if tl.load(line + WHOLE) != 0:
                norm = row_norm(
                    floats_at(line, X) + row * heads * width, heads * width, fraction(line, EPS), BLOCK
                )
                weight = floats_at(line, WEIGHT) + head * width
                values = values * norm * tl.load(weight + col, mask=inside, other=0.0)
            else:
                values = normalised(values, floats_at(line, WEIGHT), col, inside, width, fraction(line, EPS))
        has_bias = tl.load(line + BIAS) != 0
        values += tl.load(floats_at(line, BIAS) + head * width + col, mask=inside & has_bias, other=0.0)
        limit = fraction(line, LIMIT)
        if limit > 0:
            values = tl.minimum(tl.maximum(values, -limit), limit)
        pairs = tl.load(line + PAIRS).to(tl.int32)
        if pairs > 0:
            values = turned(values, floats_at(line, TURNS) + row * 2 * pairs, width, pairs, BLOCK)
        if tl.load(line + OUT) != 0:
            out = floats_at(line, OUT) + row * tl.load(line + OUT_ROW) + head * tl.load(line + OUT_HEAD)
            tl.store(out + col, values, mask=inside)
        stored = tl.load(line + STORED)
        position = tl.load(step + 1 + MAX + row)
        place = position % tl.maximum(tl.load(line + PLACES), 1)
        is_alive = row < tl.load(step)
        if stored == 2:
            ratio = tl.load(line + RATIO)
            place = position // ratio
            is_alive = is_alive & ((position + 1) % ratio == 0)
        if (stored != 0) & is_alive:
            slot = tl.load(step + 1 + row) * tl.load(line + STRIDE) + head * tl.load(line + HEAD_STRIDE)
            to = floats_at(line, STATE) + slot + place * tl.load(line + STATE_ROW)
            tl.store(to + col, values, mask=inside)


@triton.jit
def pool(line, step, row, BLOCK: tl.constexpr, MAX: tl.constexpr):
    """A row's projections to the rings of its slot; and where its token completes a group, the group's,
    pooled by the softmax of their gates channel by channel, and normalised: to a buffer."""
    width = tl.load(line + WIDTH).to(tl.int32)
    slot = tl.load(step + 1 + row) * tl.load(line + STRIDE)
    total = pool_group(
        floats_at(line, X), floats_at(line, GATE), floats_at(line, SCALE), floats_at(line, STATE) + slot,
        floats_at(line, GATE_STATE) + slot, step, row, width, tl.load(line + RATIO),
        tl.load(line + SPLITS).to(tl.int32), tl.load(line + PLACES), BLOCK, MAX,
    )  # fmt: skip
    col = tl.arange(0, BLOCK)
    inside = col < width
    total = normalised(total, floats_at(line, WEIGHT), col, inside, width, fraction(line, EPS))
    tl.store(floats_at(line, OUT) + row * width + col, total, mask=inside)


@triton.jit
def route(
    line, step, row,
    TOP_K: tl.constexpr, SCORE: tl.constexpr, RENORMED: tl.constexpr, GROUPS: tl.constexpr,
    KEPT: tl.constexpr, BEST_OF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The experts that a row's logits choose, int64, best first, and their weights; none, -1, for a row that
    is not alive. Where there is a table of places, the chosen experts' places in it too; where there is a
    mailbox, what it is for."""
    experts = tl.load(line + WIDTH).to(tl.int32)
    choices = tl.arange(0, BLOCK)
    logit = tl.load(floats_at(line, X) + row * experts + choices, mask=choices < experts, other=0.0)
    ids = tl.load(line + OUT).to(tl.pointer_type(tl.int64)) + row * TOP_K
    weights = floats_at(line, POST) + row * TOP_K
    idents, share = chosen_experts(
        logit, floats_at(line, WEIGHT), tl.load(line + WEIGHT) != 0, experts, fraction(line, NORM_EPS),
        fraction(line, EPS), TOP_K, SCORE, RENORMED, GROUPS, KEPT, BEST_OF, BLOCK,
    )  # fmt: skip
    idents = tl.where(row < tl.load(step), idents, -1)
    is_choice = choices < TOP_K
    tl.store(weights + choices, share, mask=is_choice)
    tl.store(ids + choices, idents, mask=is_choice)
    say_places(line, step, row, idents, TOP_K, BLOCK)


@triton.jit
def say_places(line, step, row, idents, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    """Of a row's choices, the first TOP_K of idents `[BLOCK]`: their places where there is a table, and mail
    where there is a mailbox."""
    if tl.load(line + STATE) != 0:
        choices = tl.arange(0, BLOCK)
        table = tl.load(line + STATE).to(tl.pointer_type(tl.int64))
        places = tl.load(table + idents, mask=idents >= 0, other=-1)
        to = tl.load(line + COMBINE).to(tl.pointer_type(tl.int64)) + row * TOP_K
        tl.store(to + choices, places, mask=choices < TOP_K)
        if tl.load(line + MAIL) != 0:
            mail = line + tl.load(line + MAIL) * FIELDS
            leave_row(mail, step, row, idents, places, TOP_K, BLOCK)


@triton.jit
def weigh(
    line, step, row, TOP_K: tl.constexpr, SCORE: tl.constexpr, RENORMED: tl.constexpr, BLOCK: tl.constexpr
):
    """The weights that a row's logits give to experts chosen without them; else as `route`."""
    experts = tl.load(line + WIDTH).to(tl.int32)
    choices = tl.arange(0, BLOCK)
    is_choice = choices < TOP_K
    chosen = tl.load(line + GATE).to(tl.pointer_type(tl.int64)) + row * TOP_K + choices
    idents = tl.load(chosen, mask=is_choice & (row < tl.load(step)), other=-1)
    is_choice = is_choice & (idents >= 0)
    logit = tl.load(floats_at(line, X) + row * experts + idents, mask=is_choice, other=0.0)
    share = tl.where(is_choice, scores_of(logit, is_choice, SCORE), 0.0)
    if RENORMED:
        share = share / (tl.sum(share, axis=0) + fraction(line, NORM_EPS))
    share = share * fraction(line, EPS)
    tl.store(floats_at(line, POST) + row * TOP_K + choices, share, mask=choices < TOP_K)
    say_places(line, step, row, idents, TOP_K, BLOCK)


@triton.jit
def rotations(line, step, row, LANES: tl.constexpr, MAX: tl.constexpr):
    """Cosine and sine of a row's position, rounded down to a multiple of RATIO, times frequencies `[PAIRS]`
    in float64; the sign of SPLITS is the sense of the turn."""
    pairs = tl.load(line + PAIRS).to(tl.int32)
    unit = tl.load(line + RATIO)
    position = tl.load(step + 1 + MAX + row) // unit * unit
    by = tl.load(line + X).to(tl.pointer_type(tl.float64))
    for first in range(0, pairs, LANES):  # numbers in float64 take two registers each
        pair = first + tl.arange(0, LANES)
        inside = pair < pairs
        angle = position.to(tl.float64) * tl.load(by + pair, mask=inside, other=0.0)
        out = floats_at(line, OUT) + (row * pairs + pair) * 2
        tl.store(out, tl.cos(angle).to(tl.float32), mask=inside)
        sine = tl.sin(angle).to(tl.float32)
        tl.store(out + 1, tl.where(tl.load(line + SPLITS) < 0, -sine, sine), mask=inside)


@triton.jit
def row_tasks(
    table, step, KINDS: tl.constexpr, BLOCK: tl.constexpr, MAX: tl.constexpr,
    N: tl.constexpr, COUNT: tl.constexpr, SPLITS_N: tl.constexpr,
    TOP_K: tl.constexpr, SCORE: tl.constexpr, RENORMED: tl.constexpr, GROUPS: tl.constexpr,
    KEPT: tl.constexpr, BEST_OF: tl.constexpr,
):  # fmt: skip
    """Grid (tasks, rows, most heads of a task); only KINDS are compiled."""
    line = table + tl.program_id(0) * FIELDS
    row, head = tl.program_id(1), tl.program_id(2)
    kind = tl.load(line + KIND)
    if KINDS & 1:
        if kind == LATENT:
            latent(line, step, row, head, BLOCK, MAX)
    if head == 0:
        if KINDS & 2:
            if kind == POOL:
                pool(line, step, row, BLOCK, MAX)
        if KINDS & 4:
            if kind == MIX:
                finish_mix(
                    floats_at(line, X), floats_at(line, SCALE), floats_at(line, BASE), floats_at(line, OUT),
                    floats_at(line, POST), floats_at(line, COMBINE), row, tl.load(line + SPLITS).to(tl.int32),
                    tl.load(line + WIDTH).to(tl.float32), tl.load(line + ITERATIONS).to(tl.int32),
                    fraction(line, EPS), fraction(line, NORM_EPS), N, COUNT, SPLITS_N,
                )  # fmt: skip
        if KINDS & 8:
            if kind == ROUTE:
                route(line, step, row, TOP_K, SCORE, RENORMED, GROUPS, KEPT, BEST_OF, BLOCK)
        if KINDS & 16:
            if kind == ROTATIONS:
                rotations(line, step, row, LANES, MAX)
        if KINDS & 32:
            if kind == WEIGH:
                weigh(line, step, row, TOP_K, SCORE, RENORMED, BLOCK)
        if KINDS & 64:
            if kind == READING:
                finish_reading(
                    floats_at(line, X), floats_at(line, SCALE), floats_at(line, BASE), floats_at(line, OUT),
                    row, tl.load(line + SPLITS).to(tl.int32), tl.load(line + WIDTH).to(tl.float32),
                    fraction(line, EPS), fraction(line, NORM_EPS), N, COUNT, SPLITS_N,
                )  # fmt: skip


@dataclass(frozen=True)
class RowTask:
    """A task, its fields by their number, and what a kernel that does it must be compiled for.

    fields     tensors stand for their addresses, floats for their bits
    constants  of the kernel; tasks whose constants differ do not go together
    width      of the vector that a program holds
    heads      programs of a row
    mail       what a router leaves in a mailbox
    """

    kind: int
    fields: dict[int, torch.Tensor | float | int]
    width: int
    constants: dict[str, int | bool] = field(default_factory=dict)
    heads: int = 1
    mail: Mail | None = None

    def line(self) -> list[int]:
        """Its line of the table."""
        numbers = [0] * FIELDS.value
        numbers[KIND.value] = self.kind
        for at, value in self.fields.items():
            numbers[at] = _number(value)
        return numbers


def _number(value: torch.Tensor | float | int) -> int:
    if isinstance(value, torch.Tensor):
        return value.data_ptr()
    if isinstance(value, float):
        return int.from_bytes(struct.pack("<f", value), "little", signed=True)
    return value


def row_tasks_launch(tasks: Sequence[RowTask], step: torch.Tensor, rows: int, max_rows: int) -> Launch:
    """The launch that does all tasks for the first `rows` rows; allocates its table."""
    constants: dict[str, int | bool] = {"N": 1, "COUNT": 4, "SPLITS_N": 1, **NO_ROUTING}
    for task in tasks:
        constants |= task.constants
    constants |= {
        "KINDS": sum({1 << task.kind for task in tasks}),
        "BLOCK": int(triton.next_power_of_2(max(2, *(task.width for task in tasks)))),
        "MAX": max_rows,
    }
    lines = [task.line() for task in tasks]
    for at, task in enumerate(tasks):
        if task.mail is not None:  # whose line is so many lines on
            lines[at][MAIL.value] = len(lines) - at
            line = task.mail.line()
            lines.append(line + [0] * (FIELDS.value - len(line)))
    table = torch.tensor(lines, dtype=torch.int64).to(step.device)
    grid = (len(tasks), rows, max(task.heads for task in tasks))
    return Launch(row_tasks, grid, (table, step), constants, 4)
