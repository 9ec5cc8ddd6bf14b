"""4-bit integers as compressed-tensors, GPTQ and AWQ store them, as INT4 weights; nothing is rounded.

All pack eight codes 0..15 of four bits into an int32, which in a little-endian file is four bytes of two.

compressed-tensors (pack-quantized)   value = (code - 8) * scale
    weight_packed  int32 [rows, cols/8]        eight columns, lowest bits first
    weight_scale   bfloat16 or float16 [rows, cols/group]
GPTQ                                  value = (code - zero) * scale
    qweight        int32 [cols/8, rows]        eight columns, lowest bits first
    qzeros         int32 [cols/group, rows/8]  zero - 1 of eight rows (zero itself in version 2)
    scales         float16 [cols/group, rows]
    g_idx          int32 [cols]                the group of each column; here only those in order
AWQ (gemm)                            value = (code - zero) * scale
    qweight        int32 [cols, rows/8]        eight rows, in the order 0 2 4 6 1 3 5 7 from the lowest bits
    qzeros         int32 [cols/group, rows/8]  likewise
    scales         float16 [cols/group, rows]
"""

from __future__ import annotations

import torch

from quant.errors import FormatError
from quant.formats.int4 import Int4, Int4Offset
from quant.packed import PackedTensor

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the row, of eight, that is number i from the lowest bits
CODES = 8  # of an int32
MIDDLE = 8  # the code that Int4 takes for zero


def from_pack_quantized(
    format_: Int4, shape: tuple[int, int], packed: torch.Tensor, scales: torch.Tensor
) -> PackedTensor:
    """Of compressed-tensors: both arguments as flat bytes; the codes are not copied."""
    rows, cols = shape
    scales = scales.view(format_.scale_dtype).view(format_.scale_shape(rows, cols))
    return PackedTensor(format_, shape, packed.view(rows, cols // 2), scales)


def from_gptq(
    format_: Int4,
    shape: tuple[int, int],
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    g_idx: torch.Tensor | None,
    *,
    zeros_less_one: bool,
) -> PackedTensor:
    """Of GPTQ, arguments as flat bytes. Raises FormatError where columns are not in the order of groups."""
    rows, cols = shape
    group = group_of(cols, scales.numel() // 2 // rows)
    if g_idx is not None and not torch.equal(g_idx.view(torch.int32), torch.arange(cols).int() // group):
        raise FormatError(
            "gptq: columns are not in the order of their groups (act-order, desc_act); choose a checkpoint "
            "that was made without it"
        )
    words = qweight.view(cols // CODES, rows, CODES // 2)
    codes = words.permute(1, 0, 2).reshape(rows, cols // 2)
    zeros = _nibbles(qzeros.view(cols // group, rows // 2)) + int(zeros_less_one)
    return _assembled(format_, shape, codes, scales.view(torch.float16).view(cols // group, rows), zeros)


def from_awq(
    format_: Int4, shape: tuple[int, int], qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor
) -> PackedTensor:
    """Of AWQ, arguments as flat bytes."""
    rows, cols = shape
    groups = scales.numel() // 2 // rows
    by_column = _awq_rows(qweight.view(cols, rows // 2))  # [cols, rows]
    codes = (by_column[0::2] | by_column[1::2] << 4).t().contiguous()
    zeros = _awq_rows(qzeros.view(groups, rows // 2))
    return _assembled(format_, shape, codes, scales.view(torch.float16).view(groups, rows), zeros)


def group_of(cols: int, groups: int) -> int:
    """Columns of a group. Raises FormatError where they are not equally many."""
    if groups < 1 or cols % groups:
        raise FormatError(f"int4: {cols} columns in {groups} groups")
    return cols // groups


def _assembled(
    format_: Int4, shape: tuple[int, int], codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor
) -> PackedTensor:
    """codes `[rows, cols/2]`, scales float16 and zeros uint8 `[groups, rows]`; groups may be wider than the
    format's."""
    repeats = shape[1] // format_.tile_cols // len(scales)
    scales = scales.t()  # [rows, groups]
    if isinstance(format_, Int4Offset):
        offsets = (MIDDLE - zeros.t().float()) * scales.float()
        scales = torch.stack((scales.float(), offsets), dim=-1)
    elif not bool((zeros == MIDDLE).all()):
        raise FormatError(f"{format_.name}: a zero point is not {MIDDLE}, though the config says sym")
    return PackedTensor(format_, shape, codes, scales.repeat_interleave(repeats, dim=1).contiguous())


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    """`[n, m]` bytes -> `[n, 2m]` codes, low nibble first."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)


def _awq_rows(packed: torch.Tensor) -> torch.Tensor:
    """`[n, rows/2]` bytes -> `[n, rows]` codes in the order of the rows."""
    order = torch.tensor([AWQ_ORDER.index(row) for row in range(CODES)])
    return _nibbles(packed).view(len(packed), -1, CODES).index_select(2, order).flatten(1)
