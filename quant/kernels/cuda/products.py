"""Triton: many matrices times many vectors in one launch, for the few rows of a recorded step.

A table in the GPU's memory says of each matrix where it is, in which format, what it is multiplied with and
where to. So one launch takes whatever is ready at the same time: matrices of different formats and sizes, of
one input or of several, and pairs of which only `silu(min(gate, limit)) * clamp(up, -limit, limit)` is
wanted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from quant.errors import FormatError
from quant.formats.fp8 import Fp8
from quant.kernels.cuda.decode import (
    CHUNK,
    INT4,
    INT4_OFFSET,
    MXFP4,
    NF4,
    UNIT,
    check_reachable,
    four_bit_kind,
    nf4_levels,
)
from quant.kernels.cuda.launch import Launch
from quant.kernels.cuda.linear import Blocks, is_compiled
from quant.kernels.cuda.moe import swiglu
from quant.kernels.cuda.times import (
    fp8_times_matrix,
    fp8_times_vector,
    plain_times_matrix,
    plain_times_vector,
    store_tile,
    times_matrix,
    times_vector,
)
from quant.kernels.interface import Weight
from quant.packed import PackedTensor

ALIGNMENT = 16
MOST = 16  # matrices of a launch

# Fields of the table, one line of 16 numbers for each matrix.
CODES: tl.constexpr = tl.constexpr(0)
SCALES: tl.constexpr = tl.constexpr(1)
UP_CODES: tl.constexpr = tl.constexpr(2)
UP_SCALES: tl.constexpr = tl.constexpr(3)
X: tl.constexpr = tl.constexpr(4)
OUT: tl.constexpr = tl.constexpr(5)
ROWS: tl.constexpr = tl.constexpr(6)
COLS: tl.constexpr = tl.constexpr(7)
SCALE_COLS: tl.constexpr = tl.constexpr(8)
X_WIDTH: tl.constexpr = tl.constexpr(9)
OUT_WIDTH: tl.constexpr = tl.constexpr(10)
FIRST: tl.constexpr = tl.constexpr(11)
FORM: tl.constexpr = tl.constexpr(12)
BIAS: tl.constexpr = tl.constexpr(13)
FIELDS: tl.constexpr = tl.constexpr(16)

BF16: tl.constexpr = tl.constexpr(0)
F32: tl.constexpr = tl.constexpr(1)
F16: tl.constexpr = tl.constexpr(2)
FP8: tl.constexpr = tl.constexpr(3)
FOUR_BIT: tl.constexpr = tl.constexpr(4)
PLAIN = {torch.bfloat16: 0, torch.float32: 1, torch.float16: 2}


@triton.jit
def address(line, FIELD: tl.constexpr, ALIGNED: tl.constexpr):
    """The bytes that a field of a line says where to find."""
    at = tl.load(line + FIELD)
    if ALIGNED:
        at = tl.multiple_of(at, 16)
    return at.to(tl.pointer_type(tl.uint8))


@triton.jit
def number(line, FIELD: tl.constexpr, ALIGNED: tl.constexpr):
    """A size in a field of a line."""
    found = tl.load(line + FIELD).to(tl.int32)
    if ALIGNED:
        found = tl.multiple_of(found, 16)
    return found


@triton.jit
def of_floats(
    x, x_rows, x_inside, weight, rows, row_inside, cols,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STEP: tl.constexpr, IN_PARTS: tl.constexpr,
):  # fmt: skip
    """Rows of x times rows of a plain weight; `[BLOCK_N]` for one, `[BLOCK_M, BLOCK_N]` for more."""
    if BLOCK_M == 1:
        return plain_times_vector(x + x_rows * cols, weight, rows, row_inside, cols, BLOCK_N, STEP)
    else:
        return plain_times_matrix(
            x, x_rows, x_inside, weight, rows, row_inside, cols, BLOCK_M, BLOCK_N, STEP, IN_PARTS
        )


@triton.jit
def of_fp8(
    x, x_rows, x_inside, codes, scales, rows, row_inside, cols, scale_cols,
    TILE_ROWS: tl.constexpr, TILE_COLS: tl.constexpr, POWERS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STEP: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """As `of_floats` for an FP8 weight."""
    if not POWERS:
        scales = scales.to(tl.pointer_type(tl.float32))
    if BLOCK_M == 1:
        return fp8_times_vector(
            x + x_rows * cols, codes, scales, rows, row_inside, cols, scale_cols,
            TILE_ROWS, TILE_COLS, POWERS, BLOCK_N, STEP // CHUNK,
        )  # fmt: skip
    else:
        return fp8_times_matrix(
            x, x_rows, x_inside, codes, scales, rows, row_inside, cols, scale_cols,
            TILE_ROWS, TILE_COLS, POWERS, BLOCK_M, BLOCK_N, STEP // CHUNK, PARTS and POWERS,
        )  # fmt: skip


@triton.jit
def of_four_bits(
    x, x_rows, x_inside, codes, scales, levels, rows, row_inside, cols,
    KIND: tl.constexpr, PER_SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STEP: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """As `of_floats` for a four-bit weight."""
    if KIND == NF4:
        scales = scales.to(tl.pointer_type(tl.float32))
    elif KIND == INT4 or KIND == INT4_OFFSET:
        scales = scales.to(tl.pointer_type(tl.bfloat16))
    units = cols // UNIT
    if BLOCK_M == 1:
        return times_vector(
            x + x_rows * cols, codes, scales, levels, rows, row_inside, units,
            KIND, PER_SCALE, BLOCK_N, STEP // UNIT,
        )  # fmt: skip
    else:
        return times_matrix(
            x, x_rows, x_inside, codes, scales, levels, rows, row_inside, units,
            KIND, PER_SCALE, BLOCK_M, BLOCK_N, STEP // UNIT, PARTS and KIND == MXFP4,
        )  # fmt: skip


@triton.jit
def of_any(
    form, x, x_rows, x_inside, codes, scales, levels, rows, row_inside, cols, scale_cols,
    FORMS: tl.constexpr, KIND: tl.constexpr, PER_SCALE: tl.constexpr,
    TILE_ROWS: tl.constexpr, TILE_COLS: tl.constexpr, POWERS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STEP: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """As `of_floats` for a weight in that form; only the forms in the bits of FORMS are compiled."""
    if BLOCK_M == 1:
        total = tl.zeros([BLOCK_N], tl.float32)
    else:
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if FORMS & 1:
        if form == BF16:
            total = of_floats(
                x, x_rows, x_inside, codes.to(tl.pointer_type(tl.bfloat16)), rows, row_inside, cols,
                BLOCK_M, BLOCK_N, STEP, PARTS,
            )  # fmt: skip
    if FORMS & 2:
        if form == F32:
            total = of_floats(
                x, x_rows, x_inside, codes.to(tl.pointer_type(tl.float32)), rows, row_inside, cols,
                BLOCK_M, BLOCK_N, STEP, False,
            )  # fmt: skip
    if FORMS & 4:
        if form == F16:
            total = of_floats(
                x, x_rows, x_inside, codes.to(tl.pointer_type(tl.float16)), rows, row_inside, cols,
                BLOCK_M, BLOCK_N, STEP, False,
            )  # fmt: skip
    if FORMS & 8:
        if form == FP8:
            total = of_fp8(
                x, x_rows, x_inside, codes, scales, rows, row_inside, cols, scale_cols,
                TILE_ROWS, TILE_COLS, POWERS, BLOCK_M, BLOCK_N, STEP, PARTS,
            )  # fmt: skip
    if FORMS & 16:
        if form == FOUR_BIT:
            total = of_four_bits(
                x, x_rows, x_inside, codes, scales, levels, rows, row_inside, cols,
                KIND, PER_SCALE, BLOCK_M, BLOCK_N, STEP, PARTS,
            )  # fmt: skip
    return total


@triton.jit(do_not_specialize=["count", "tokens"])
def products(
    table, levels, count, tokens, limit,
    FORMS: tl.constexpr, KIND: tl.constexpr, PER_SCALE: tl.constexpr,
    TILE_ROWS: tl.constexpr, TILE_COLS: tl.constexpr, POWERS: tl.constexpr,
    GATED: tl.constexpr, BIASED: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STEP: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Each of `count` matrices in the table; grid (blocks of all their rows times blocks of tokens)."""
    token_blocks = tl.cdiv(tokens, BLOCK_M)
    block = tl.program_id(0) // token_blocks
    token_block = tl.program_id(0) % token_blocks
    each = tl.arange(0, FIELDS)
    firsts = tl.load(table + each * FIELDS + FIRST, mask=each < count, other=1 << 40)
    line = table + (tl.sum((firsts <= block).to(tl.int32), axis=0) - 1) * FIELDS
    n, cols = number(line, ROWS, False), number(line, COLS, ALIGNED)
    scale_cols = number(line, SCALE_COLS, False)
    form = number(line, FORM, False)
    rows = (block - tl.load(line + FIRST).to(tl.int32)) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_inside = rows < n
    x = address(line, X, ALIGNED).to(tl.pointer_type(tl.float32))
    out = address(line, OUT, ALIGNED).to(tl.pointer_type(tl.float32))
    codes, scales = address(line, CODES, ALIGNED), address(line, SCALES, ALIGNED)
    out_width = number(line, OUT_WIDTH, False)
    if BLOCK_M == 1:
        token = token_block
        inside = token < tokens
    else:
        token = token_block * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = token < tokens
    x_rows = token * (number(line, X_WIDTH, False) // cols)
    total = of_any(
        form, x, x_rows, inside, codes, scales, levels, rows, row_inside, cols, scale_cols,
        FORMS, KIND, PER_SCALE, TILE_ROWS, TILE_COLS, POWERS, BLOCK_M, BLOCK_N, STEP, PARTS,
    )  # fmt: skip
    if GATED:
        if tl.load(line + UP_CODES) != 0:
            up = of_any(
                form, x, x_rows, inside, address(line, UP_CODES, ALIGNED), address(line, UP_SCALES, ALIGNED),
                levels, rows, row_inside, cols, scale_cols,
                FORMS, KIND, PER_SCALE, TILE_ROWS, TILE_COLS, POWERS, BLOCK_M, BLOCK_N, STEP, PARTS,
            )  # fmt: skip
            total = swiglu(total, up, limit)
    if BIASED:
        if tl.load(line + BIAS) != 0:
            bias = tl.load(line + BIAS).to(tl.pointer_type(tl.float32))
            more = tl.load(bias + rows, mask=row_inside, other=0.0)
            if BLOCK_M == 1:
                total += more
            else:
                total += more[None, :]
    if BLOCK_M == 1:
        tl.store(out + token * out_width + rows, total, mask=row_inside)
    else:
        store_tile(out, total, token, inside, rows, row_inside, out_width)


@dataclass(frozen=True)
class Product:
    """A matrix times the rows of x, or of a pair the gated product.

    x    `[rows, ...]` float32, perhaps columns of something wider
    out  the same
    up   the matrix whose product `weight`'s gates
    bias `[rows of the weight]` float32, added
    """

    weight: Weight
    x: torch.Tensor
    out: torch.Tensor
    up: Weight | None = None
    bias: torch.Tensor | None = None


def check_multiplies(weight: Weight) -> None:
    """Raise FormatError for a weight that no product reads."""
    if isinstance(weight, torch.Tensor):
        if weight.dtype not in PLAIN or weight.numel() >= 2**31 or not weight.is_contiguous():
            raise FormatError(f"{weight.dtype} of {list(weight.shape)}: no Triton kernel multiplies with it")
        return
    if four_bit_kind(weight) is None and not isinstance(weight.format, Fp8):
        raise FormatError(f"{weight.format.name}: no Triton kernel supports it")
    check_reachable(weight)


def family_of(weight: Weight) -> str:
    """Weights of different families may be multiplied in one launch; of one, if the format is the same."""
    if isinstance(weight, torch.Tensor):
        return "plain"
    return "four bits" if four_bit_kind(weight) is not None else "fp8"


def go_together(weights: Sequence[Weight], count: int) -> bool:
    """Whether one launch can take these, of `count` products."""
    formats: dict[str, object] = {}
    for weight in weights:
        if isinstance(weight, PackedTensor):
            assert weight.scales is not None
            described = weight.format, weight.scales.dtype
            if formats.setdefault(family_of(weight), described) != described:
                return False
    return count <= MOST


def products_launch(parts: Sequence[Product], rows: int, limit: float = 0.0) -> Launch:
    """The launch that computes all parts for the first `rows` rows; allocates its table."""
    device = parts[0].x.device
    blocks = Blocks.of(rows, torch.float32)
    if any(part.up is not None for part in parts) and blocks.tokens > 1:
        blocks = replace(blocks, rows=blocks.rows // 2)  # two sums at once spill registers
    blocks = blocks.on(device)
    lines, constants = _table(parts, blocks.rows)
    total = lines[-1][FIRST.value] + -(-parts[-1].weight.shape[0] // blocks.rows)
    constants |= {
        "GATED": any(part.up is not None for part in parts),
        "BIASED": any(part.bias is not None for part in parts),
        "ALIGNED": all(_is_aligned(line) for line in lines),
        "BLOCK_M": blocks.tokens,
        "BLOCK_N": blocks.rows,
        "STEP": blocks.cols,
        "PARTS": is_compiled(device),
    }
    table = torch.tensor(lines, dtype=torch.int64).to(device)
    grid = (total * -(-rows // blocks.tokens),)
    arguments = (table, nf4_levels(device), len(parts), rows, limit)
    return Launch(products, grid, arguments, constants, blocks.warps)


def _table(parts: Sequence[Product], block_rows: int) -> tuple[list[list[int]], dict[str, int | bool]]:
    """The lines of the table, and what the formats in it make of the kernel."""
    constants: dict[str, int | bool] = {
        "FORMS": 0, "KIND": -1, "PER_SCALE": 1, "TILE_ROWS": 1, "TILE_COLS": 32, "POWERS": True,
    }  # fmt: skip
    lines: list[list[int]] = []
    first = 0
    for part in parts:
        weight, scale_cols = part.weight, 0
        if isinstance(weight, torch.Tensor):
            form = PLAIN[weight.dtype]
        elif isinstance(weight.format, Fp8):
            assert weight.scales is not None
            form, scale_cols = FP8.value, weight.scales.shape[1]
            constants["TILE_ROWS"], constants["TILE_COLS"] = weight.format.tile_rows, weight.format.tile_cols
            constants["POWERS"] = weight.scales.dtype == torch.uint8
        else:
            kind = four_bit_kind(weight)
            assert kind is not None
            form = FOUR_BIT.value
            constants["KIND"], constants["PER_SCALE"] = kind, weight.format.tile_cols // UNIT.value
        constants["FORMS"] |= 1 << form
        rows, cols = weight.shape
        up = (0, 0) if part.up is None else _addresses(part.up)
        line = [
            *_addresses(weight), *up, part.x.data_ptr(), part.out.data_ptr(), rows, cols, scale_cols,
            part.x.stride(0), part.out.stride(0), first, form,
            0 if part.bias is None else part.bias.data_ptr(),
        ]  # fmt: skip
        lines.append([*line, *[0] * (FIELDS.value - len(line))])
        first += -(-rows // block_rows)
    return lines, constants


def _addresses(weight: Weight) -> tuple[int, int]:
    """Of codes and scales."""
    if isinstance(weight, torch.Tensor):
        return weight.data_ptr(), weight.data_ptr()
    assert weight.scales is not None
    return weight.codes.data_ptr(), weight.scales.data_ptr()


def _is_aligned(line: Sequence[int]) -> bool:
    """Whether all addresses, and the rows of the matrix, begin at multiples that vectors are loaded from."""
    places = line[CODES.value : OUT.value + 1]
    return not any(at % ALIGNMENT for at in (*places, line[COLS.value], line[X_WIDTH.value]))
