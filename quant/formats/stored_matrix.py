"""How a checkpoint stores one matrix: which tensors, of which dtypes and shapes, and the weight they make.

The endings of a matrix's tensors, their dtypes and `quantization_config` say in which of these layouts it is:

| tensors of matrix NAME | layout |
|---|---|
| `.weight` BF16, F16, F32 | plain |
| `.weight` of a GGUF type | that type |
| `.weight` F8_E4M3 with `.weight_scale_inv` or `.weight_scale` | FP8 in tiles of `weight_block_size` |
| `.weight` with `.scale` | `quant/formats/stored.py`: DeepSeek V4, and what Loci converts |
| `.weight_packed` I32 with `.weight_scale` | compressed-tensors INT4 |
| `.weight_packed` U8 with `.weight_scale`, `.weight_global_scale` | compressed-tensors NVFP4 |
| `.weight` U8 with `.weight_scale`, `.weight_scale_2` | ModelOpt NVFP4 |
| `.qweight`, `.qzeros`, `.scales`, perhaps `.g_idx` | GPTQ, AWQ |

Fused experts, `[experts, rows, cols]`, are one matrix for each expert: their tensors are cut before
(`TensorEntry.of`); gpt-oss's are read by `from_mxfp4_blocks`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from quant.errors import FormatError
from quant.formats import gguf
from quant.formats.group_int4 import CODES, from_awq, from_gptq, from_pack_quantized, group_of
from quant.formats.int4 import (
    INT4_GROUPS,
    INT4_HALF_GROUPS,
    INT4_OFFSET_FLOAT_GROUPS,
    Int4,
)
from quant.formats.mxfp4 import MXFP4
from quant.formats.nvfp4 import BLOCK, NVFP4, with_factors
from quant.formats.plain import PLAIN, as_packed
from quant.formats.quantization_config import QuantizationConfig, Role
from quant.formats.stored import FLOAT_DTYPES, FP8_SCALES, Stored, format_of, stored_as, unpack
from quant.packed import Format, PackedTensor

Weight = torch.Tensor | PackedTensor
Raw = Mapping[str, torch.Tensor]  # flat bytes (uint8) by the ending of a tensor's name


class Header(Protocol):
    """What is known of a tensor without reading it."""

    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class StoredMatrix:
    """A `[rows, cols]` matrix of a checkpoint.

    name     the tensors' names without their endings
    format   of the weight, `Plain` for plain floats
    tensors  ending -> what is expected of the tensor; of plain floats and GGUF types `.weight` alone
    unread   endings of those that say nothing new
    """

    name: str
    shape: tuple[int, int]
    format: Format
    tensors: Mapping[str, Stored]
    make: Callable[[Raw], Weight]
    unread: frozenset[str] = frozenset()

    @property
    def needed(self) -> list[str]:
        """Names of the tensors that `weight` reads."""
        return [self.name + ending for ending in self.tensors if ending not in self.unread]

    def weight(self, raw: Mapping[str, torch.Tensor]) -> Weight:
        """The matrix from the bytes (flat uint8) of its tensors by name. Raises FormatError."""
        return self.make({name.removeprefix(self.name): raw[name] for name in self.needed})

    def packed(self, raw: Mapping[str, torch.Tensor]) -> PackedTensor:
        """As `weight`, with plain floats as `Plain` too."""
        weight = self.weight(raw)
        return as_packed(weight) if isinstance(weight, torch.Tensor) else weight


def find_matrix(
    name: str, shape: tuple[int, int], headers: Mapping[str, Header], config: QuantizationConfig
) -> StoredMatrix:
    """How the checkpoint with these headers stores matrix `name` of `shape`; only headers are looked at.

    A matrix of which there is no tensor is taken for a plain one, so that what is missing can be reported.
    Raises FormatError for tensors that no layout has.
    """
    found = _Found(name, shape, headers, config)
    for layout in (_gptq, _awq, _pack_quantized, _nvfp4, _fp8, _scaled):
        matrix = layout(found)
        if matrix is not None:
            return matrix
    return _plain(found)


@dataclass(frozen=True)
class _Found:
    name: str
    shape: tuple[int, int]
    headers: Mapping[str, Header]
    config: QuantizationConfig

    def dtype(self, ending: str) -> str | None:
        header = self.headers.get(self.name + ending)
        return None if header is None else header.dtype

    def tensor_shape(self, ending: str) -> tuple[int, ...]:
        header = self.headers.get(self.name + ending)
        return () if header is None else header.shape

    def optional(self, **stored: Stored) -> dict[str, Stored]:
        """Those of the tensors that are there."""
        return {
            f".{name}": tensor for name, tensor in stored.items() if f"{self.name}.{name}" in self.headers
        }

    def matrix(
        self,
        format_: Format,
        tensors: Mapping[str, Stored],
        make: Callable[[Raw], Weight],
        *unread: str,
    ) -> StoredMatrix:
        return StoredMatrix(self.name, self.shape, format_, tensors, make, frozenset(unread))

    def int4(self, groups: Mapping[int, Int4], scales: str) -> Int4:
        """The INT4 format of a matrix with this many columns of scales, in groups as wide as there are."""
        cols, count = self.shape[1], self.tensor_shape(f".{scales}")
        group = group_of(cols, (count or (1,))[-1 if scales == "weight_scale" else 0])
        for width in sorted(groups, reverse=True):
            if group % width == 0 and (group == width or scales != "weight_scale"):
                return groups[width]
        raise FormatError(
            f"{self.name}: int4 in groups of {group} columns; supported: multiples of {min(groups)}"
        )


def _plain(found: _Found) -> StoredMatrix:
    dtype = found.dtype(".weight")
    if dtype in gguf.FORMATS:
        return found.matrix(
            gguf.FORMATS[dtype],
            {".weight": Stored((dtype,), found.shape)},
            lambda raw: gguf.weight_from_bytes(dtype, found.shape, raw[".weight"]),
        )
    if dtype is not None and dtype not in FLOAT_DTYPES:
        raise FormatError(
            f"{found.name}.weight is {dtype} without scales; no format stores a matrix like that; supported: "
            "BF16, F16, F32, and packed weights with their scales (docs/formats.md)"
        )
    return found.matrix(
        PLAIN[FLOAT_DTYPES[dtype or "F32"]],
        {".weight": Stored(tuple(FLOAT_DTYPES), found.shape)},
        lambda raw: gguf.weight_from_bytes(dtype or "F32", found.shape, raw[".weight"]),
    )


def _scaled(found: _Found) -> StoredMatrix | None:
    weight, scale = found.dtype(".weight"), found.dtype(".scale")
    if weight is None or scale is None:
        return None
    format_ = format_of(Role.DENSE, weight, scale, found.config)
    assert format_ is not None
    codes, scales = stored_as(format_, *found.shape)
    return found.matrix(
        format_,
        {".weight": codes, ".scale": scales},
        lambda raw: unpack(format_, found.shape, raw[".weight"], raw[".scale"], scale),
    )


def _fp8(found: _Found) -> StoredMatrix | None:
    if found.dtype(".weight") != "F8_E4M3":
        return None
    inverse = found.dtype(".weight_scale_inv") is not None  # only in name: it is multiplied like the other
    ending = ".weight_scale_inv" if inverse else ".weight_scale"
    scale = found.dtype(ending)
    if scale is None:
        return None
    format_ = found.config.dense
    codes, scales = stored_as(format_, *found.shape)
    if scale not in FP8_SCALES or found.tensor_shape(ending) != scales.shape:
        raise FormatError(
            f"{found.name}{ending} is {scale} {list(found.tensor_shape(ending))}; FP8 is read with one scale "
            f"for each {format_.tile_rows}x{format_.tile_cols} tile, here {list(scales.shape)}"
        )
    return found.matrix(
        format_,
        {".weight": codes, ending: scales, **found.optional(input_scale=Stored(("F32", "BF16"), ()))},
        lambda raw: unpack(format_, found.shape, raw[".weight"], raw[ending], scale),
        ".input_scale",
    )


def _pack_quantized(found: _Found) -> StoredMatrix | None:
    if found.dtype(".weight_packed") != "I32":
        return None
    rows, cols = found.shape
    scale = found.dtype(".weight_scale")
    if scale not in ("BF16", "F16"):
        raise FormatError(f"{found.name}.weight_scale is {scale or 'missing'}, expected BF16 or F16")
    groups: Mapping[int, Int4] = INT4_GROUPS if scale == "BF16" else INT4_HALF_GROUPS
    format_ = found.int4(groups, "weight_scale")
    return found.matrix(
        format_,
        {
            ".weight_packed": Stored(("I32",), (rows, cols // CODES)),
            ".weight_scale": Stored((scale,), format_.scale_shape(rows, cols)),
            **found.optional(weight_shape=Stored(("I32", "I64"), (2,))),
        },
        lambda raw: from_pack_quantized(format_, found.shape, raw[".weight_packed"], raw[".weight_scale"]),
        ".weight_shape",
    )


def _nvfp4(found: _Found) -> StoredMatrix | None:
    rows, cols = found.shape
    if found.dtype(".weight_packed") == "U8":
        codes, factor, divides = ".weight_packed", ".weight_global_scale", True
    elif found.dtype(".weight") == "U8" and found.dtype(".weight_scale_2") is not None:
        codes, factor, divides = ".weight", ".weight_scale_2", False
    else:
        return None
    factor_shape = found.tensor_shape(factor)
    NVFP4.expect_whole_blocks(cols)

    def make(raw: Raw) -> PackedTensor:
        value = raw[factor].view(torch.float32)
        scales = raw[".weight_scale"].view(rows, cols // BLOCK)
        stored = with_factors(scales, value.reciprocal() if divides else value)
        return PackedTensor(NVFP4, found.shape, raw[codes].view(rows, cols // 2), stored)

    inputs = Stored(("F32",), found.tensor_shape(".input_global_scale" if divides else ".input_scale"))
    return found.matrix(
        NVFP4,
        {
            codes: Stored(("U8",), (rows, cols // 2)),
            ".weight_scale": Stored(("F8_E4M3",), (rows, cols // BLOCK)),
            factor: Stored(("F32",), factor_shape if factor_shape in ((), (1,)) else (1,)),
            **found.optional(input_global_scale=inputs, input_scale=inputs),
        },
        make,
        ".input_global_scale",
        ".input_scale",
    )


def _gptq(found: _Found) -> StoredMatrix | None:
    if found.dtype(".qweight") is None or found.config.method != "gptq":
        return None
    rows, cols = found.shape
    format_ = found.int4(INT4_OFFSET_FLOAT_GROUPS if found.config.has_zeros else INT4_HALF_GROUPS, "scales")
    tensors = {".qweight": Stored(("I32",), (cols // CODES, rows))} | _groups(found)
    return found.matrix(
        format_,
        tensors | found.optional(g_idx=Stored(("I32",), (cols,))),
        lambda raw: from_gptq(
            format_, found.shape, raw[".qweight"], raw[".qzeros"], raw[".scales"], raw.get(".g_idx"),
            zeros_less_one=found.config.zeros_less_one,
        ),
    )  # fmt: skip


def _awq(found: _Found) -> StoredMatrix | None:
    if found.dtype(".qweight") is None:
        return None
    if found.config.method != "awq":
        raise FormatError(
            f"{found.name}.qweight: the config does not say that this is GPTQ or AWQ (quant_method is "
            f"{found.config.method})"
        )
    rows, cols = found.shape
    format_ = found.int4(INT4_OFFSET_FLOAT_GROUPS, "scales")
    return found.matrix(
        format_,
        {".qweight": Stored(("I32",), (cols, rows // CODES))} | _groups(found),
        lambda raw: from_awq(format_, found.shape, raw[".qweight"], raw[".qzeros"], raw[".scales"]),
    )


def _groups(found: _Found) -> dict[str, Stored]:
    """Zero points and scales of GPTQ and AWQ, in as many groups as there are scales."""
    rows, groups = found.shape[0], (found.tensor_shape(".scales") or (1,))[0]
    return {
        ".qzeros": Stored(("I32",), (groups, rows // CODES)),
        ".scales": Stored(("F16",), (groups, rows)),
    }


def from_mxfp4_blocks(shape: tuple[int, int], blocks: torch.Tensor, scales: torch.Tensor) -> PackedTensor:
    """An expert's matrix of gpt-oss from the bytes of its parts of `NAME_blocks` and `NAME_scales`.

    blocks `[rows, cols/32, 16]`, scales `[rows, cols/32]`; not copied.
    """
    rows, cols = shape
    MXFP4.expect_whole_blocks(cols)
    return PackedTensor(
        MXFP4, shape, blocks.view(rows, cols // 2), scales.view(*MXFP4.scale_shape(rows, cols))
    )


def every_other_row(packed: PackedTensor, first: int) -> PackedTensor:
    """Rows first, first + 2, ... of a matrix whose rows have scales of their own, as a view.

    gpt-oss interleaves gate (0) and up (1).
    """
    assert packed.format.tile_rows == 1
    scales = None if packed.scales is None else packed.scales[first::2]
    codes = packed.codes[first::2]
    return PackedTensor(packed.format, (len(codes), packed.shape[1]), codes, scales)
