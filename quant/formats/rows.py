"""Rows of a cache in few bits: each row by itself, encoded once when it is appended.

A row of `dim` values lies in one piece, filled up to a multiple of four bytes:

codes   of all columns but the last `tail`: e4m3 or int8, a byte each; or e2m1, two in a byte, the even
        column in the low nibble
tail    bf16: rotary channels, whose angles would suffer most
scales  one for each `group` columns (the last group may be cut): ue8m0, e4m3 or float32

With ue8m0 the scale is the smallest power of two that clips nothing; with e4m3 or float32 it is the largest
magnitude by the largest code. Numbers are rounded to the nearest, ties to even. Encoding what was decoded
gives the same values again. bf16 rows are all tail.

turned  rows are multiplied by an orthonormal Hadamard matrix first, which spreads outliers over all columns.
        Whoever multiplies with such a row turns the other factor too (`as_query`): the product stays.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch.nn import functional as F

from quant.formats.fp8 import E4M3_LARGEST, MIN_FLOAT_SCALE
from quant.formats.mxfp4 import E2M1, E2M1_LARGEST, MXFP4
from quant.formats.ue8m0 import covering_scale, decode_ue8m0, inverse_ue8m0

Code = Literal["bf16", "e4m3", "e2m1", "int8"]
Scale = Literal["ue8m0", "e4m3", "float32"]
# In the order of `RowCode` and `RowScale` in quant/kernels/cpu/native_src/kernels.hpp.
CODES: tuple[Code, ...] = ("bf16", "e4m3", "e2m1", "int8")
SCALES: tuple[Scale, ...] = ("ue8m0", "e4m3", "float32")

INT8_LARGEST = 127.0
LARGEST: dict[Code, float] = {"e4m3": E4M3_LARGEST, "e2m1": E2M1_LARGEST, "int8": INT8_LARGEST}
SCALE_BYTES: dict[Scale, int] = {"ue8m0": 1, "e4m3": 1, "float32": 4}
ALIGNMENT = 4  # bytes


@dataclass(frozen=True)
class RowFormat:
    """How rows of `dim` columns are encoded; see the module. group: 0 for all columns that have codes."""

    dim: int
    code: Code
    scale: Scale = "ue8m0"
    group: int = 0
    tail: int = 0
    turned: bool = False

    def __post_init__(self) -> None:
        if self.code == "bf16":
            object.__setattr__(self, "tail", self.dim)
        object.__setattr__(self, "group", self.group or max(1, self.coded))

    @property
    def coded(self) -> int:
        """Columns that have codes."""
        return self.dim - self.tail

    @property
    def groups(self) -> int:
        """Scales of a row."""
        return -(-self.coded // self.group)

    @property
    def code_bytes(self) -> int:
        """Bytes of a row's codes."""
        return -(-self.coded // 2) if self.code == "e2m1" else self.coded

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        nbytes = self.code_bytes + 2 * self.tail + self.groups * SCALE_BYTES[self.scale]
        return -(-nbytes // ALIGNMENT) * ALIGNMENT

    @property
    def rounds_queries(self) -> bool:
        """Whether index queries are rounded like the keys that they are multiplied with: in the engines of
        those makers whose scales are powers of two."""
        return self.tail == 0 and self.scale == "ue8m0"

    def as_query(self, x: torch.Tensor) -> torch.Tensor:
        """Index queries `[..., dim]` as they are multiplied with such keys: turned, perhaps rounded."""
        if self.rounds_queries:
            return self.decode(self.encode(x))
        return hadamard(x) if self.turned else x

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Rows `[..., dim]` float32 as bytes, uint8 `[..., row_bytes]`."""
        if self.turned:
            x = hadamard(x)
        x = x.float()
        tail = x[..., self.coded :].to(torch.bfloat16).contiguous().view(torch.uint8)
        parts = [tail]
        if self.coded:
            padding = self.groups * self.group - self.coded
            groups = F.pad(x[..., : self.coded], (0, padding)).view(*x.shape[:-1], self.groups, self.group)
            stored, scaled = self._scaled(groups)
            codes = self._codes(scaled.flatten(-2)[..., : self.coded])
            parts = [codes, tail, stored]
        row = torch.cat(parts, dim=-1)
        return F.pad(row, (0, self.row_bytes - row.shape[-1]))

    def decode(self, rows: torch.Tensor) -> torch.Tensor:
        """Bytes `[..., row_bytes]` as values `[..., dim]` float32 (turned, where rows are)."""
        at, end = self.code_bytes, self.code_bytes + 2 * self.tail
        parts = []
        if self.coded:
            stored = rows[..., end : end + self.groups * SCALE_BYTES[self.scale]]
            scales = self._scale_values(stored).repeat_interleave(self.group, dim=-1)[..., : self.coded]
            parts.append(self._levels(rows[..., :at]) * scales)
        if self.tail:
            parts.append(_apart(rows[..., at:end]).view(torch.bfloat16).float())
        return torch.cat(parts, dim=-1)

    def _scaled(self, groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scales as they are stored, uint8, of groups `[..., groups, group]`, and these divided by them."""
        largest = groups.abs().amax(-1)
        limit = LARGEST[self.code]
        if self.scale == "ue8m0":
            stored = covering_scale(largest, limit)
            return stored, groups * inverse_ue8m0(stored).unsqueeze(-1)
        wanted = largest / limit
        if self.scale == "float32":
            scales = wanted.clamp(min=MIN_FLOAT_SCALE)
            stored = scales.contiguous().view(torch.uint8)
        else:
            codes = wanted.clamp(max=E4M3_LARGEST).to(torch.float8_e4m3fn)
            scales, stored = codes.float(), codes.view(torch.uint8)
        scales = scales.unsqueeze(-1)
        return stored, torch.where(scales == 0, torch.zeros_like(groups), groups / scales)

    def _codes(self, scaled: torch.Tensor) -> torch.Tensor:
        """Codes of values divided by their scales, uint8 `[..., code_bytes]`."""
        if self.code == "int8":
            return scaled.round().clamp(-INT8_LARGEST, INT8_LARGEST).to(torch.int8).view(torch.uint8)
        if self.code == "e4m3":
            return scaled.clamp(-E4M3_LARGEST, E4M3_LARGEST).to(torch.float8_e4m3fn).view(torch.uint8)
        levels = MXFP4.nearest_levels(F.pad(scaled, (0, self.coded % 2)))
        nibbles = MXFP4.codes_of(levels)
        return nibbles[..., 0::2] | nibbles[..., 1::2] << 4

    def _levels(self, codes: torch.Tensor) -> torch.Tensor:
        """The values of codes, `[..., coded]`, without their scales."""
        if self.code == "int8":
            return codes.view(torch.int8).float()
        if self.code == "e4m3":
            return codes.view(torch.float8_e4m3fn).float()
        nibbles = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)[..., : self.coded]
        return E2M1.to(codes.device)[nibbles.int()]

    def _scale_values(self, stored: torch.Tensor) -> torch.Tensor:
        if self.scale == "ue8m0":
            return decode_ue8m0(stored)
        dtype = torch.float32 if self.scale == "float32" else torch.float8_e4m3fn
        return _apart(stored).view(dtype).float()


def _apart(part: torch.Tensor) -> torch.Tensor:
    """A copy of a row's part: numbers of several bytes must begin at a multiple of these."""
    return part.clone(memory_format=torch.contiguous_format)


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """x `[..., n]` times the orthonormal Hadamard matrix of n columns, a power of two; its own inverse."""
    n, step = x.shape[-1], 1
    while step < n:
        pairs = x.reshape(*x.shape[:-1], n // (2 * step), 2, step)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        x = torch.stack((a + b, a - b), dim=-2).flatten(-3)
        step *= 2
    return x * torch.tensor(1 / math.sqrt(n), dtype=torch.float32)


@dataclass(frozen=True)
class EncodedRows:
    """Rows `[..., dim]` as the bytes `[..., row_bytes]` of their format.

    columns  the first so many are meant; all where None
    """

    codes: torch.Tensor
    format: RowFormat
    columns: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the values."""
        return (*self.codes.shape[:-1], self.columns or self.format.dim)

    @property
    def device(self) -> torch.device:
        """Where the bytes lie."""
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return self.codes.nbytes

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, index: object) -> EncodedRows:
        """Some of the rows; their columns cannot be taken apart."""
        return EncodedRows(self.codes[index], self.format, self.columns)  # type: ignore[index]

    def to(self, device: torch.device) -> EncodedRows:
        """The same on `device`."""
        return EncodedRows(self.codes.to(device), self.format, self.columns)

    def decode(self) -> torch.Tensor:
        """The values, float32 (turned, where the format says so)."""
        return self.format.decode(self.codes)[..., : self.columns or self.format.dim]


Rows = torch.Tensor | EncodedRows  # float32 values, or encoded ones


def values_of(rows: Rows) -> torch.Tensor:
    """The values of rows that may be encoded."""
    return rows if isinstance(rows, torch.Tensor) else rows.decode()


def bytes_of(rows: Rows) -> torch.Tensor:
    """What a cache keeps of rows: the values, or the bytes of encoded ones."""
    return rows if isinstance(rows, torch.Tensor) else rows.codes


def like(rows: Rows, kept: torch.Tensor) -> Rows:
    """`kept` (see `bytes_of`), stored as `rows` are."""
    return kept if isinstance(rows, torch.Tensor) else EncodedRows(kept, rows.format, rows.columns)


def first_columns(rows: Rows, count: int) -> Rows:
    """The first `count` columns of rows."""
    return rows[..., :count] if isinstance(rows, torch.Tensor) else replace(rows, columns=count)


def row_format_of(rows: Rows) -> RowFormat | None:
    """How rows are encoded; None where they are float32."""
    return None if isinstance(rows, torch.Tensor) else rows.format


def stored_as(dim: int, form: RowFormat | None) -> tuple[int, torch.dtype]:
    """What a row of `dim` columns is kept as: so many numbers of a type."""
    return (dim, torch.float32) if form is None else (form.row_bytes, torch.uint8)


def rows_in(kept: torch.Tensor, form: RowFormat | None) -> Rows:
    """The rows that `kept` holds (see `bytes_of`)."""
    return kept if form is None else EncodedRows(kept, form)


def row_bytes(dim: int, form: RowFormat | None) -> int:
    """Bytes of a row of `dim` columns."""
    return dim * torch.float32.itemsize if form is None else form.row_bytes
