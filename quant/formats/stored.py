"""Which format a stored weight is in: decided from the dtypes in file headers and `quantization_config`.

A packed matrix is stored as two tensors, `NAME.weight` (codes) and `NAME.scale`; a plain one as
`NAME.weight` alone. docs/quantize.md has the rule as a table.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quant.errors import FormatError
from quant.formats.four_bit import FourBit
from quant.formats.fp8 import FP8_ROW, Fp8
from quant.formats.int4 import Int4, Int4Offset
from quant.formats.mxfp4 import MXFP4, Mxfp4
from quant.formats.nf4 import NF4, Nf4
from quant.formats.plain import Plain
from quant.formats.quantization_config import QuantizationConfig, Role
from quant.packed import Format, PackedTensor

FLOAT_DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32, "F16": torch.float16}
SCALE_DTYPES = {"F8_E8M0": torch.uint8, **FLOAT_DTYPES}
FP8_SCALES = ("F8_E8M0", "F32", "BF16")
DTYPE_NAMES = {dtype: name for name, dtype in FLOAT_DTYPES.items()}

# What the codes and the scales of four-bit formats are stored as.
CODES_AND_SCALES: dict[type[Format], tuple[tuple[str, ...], str]] = {
    Mxfp4: (("I8", "U8"), "F8_E8M0"),
    Nf4: (("U8", "I8"), "F32"),
    Int4: (("U8", "I8"), "BF16"),
    Int4Offset: (("U8", "I8"), "BF16"),
}


def format_of(
    role: Role, weight_dtype: str, scale_dtype: str | None, config: QuantizationConfig
) -> Format | None:
    """The format of a weight whose header has these dtypes; None for plain floats.

    Raises FormatError for a pair of dtypes that no format has.
    """
    if weight_dtype in FLOAT_DTYPES and scale_dtype is None:
        return None
    if weight_dtype == "F8_E4M3" and scale_dtype in FP8_SCALES:
        return FP8_ROW if role is Role.ENGRAM else config.dense
    if weight_dtype in ("I8", "U8"):
        if scale_dtype == "F8_E8M0":
            return MXFP4
        if scale_dtype == "F32":
            return NF4
        if scale_dtype == "BF16":
            return config.int4
    raise FormatError(
        f"no format stores {role} weights as {weight_dtype} with scales of {scale_dtype or 'nothing'}; "
        "supported: F8_E4M3 with F8_E8M0, F32 or BF16, I8 or U8 with F8_E8M0 (mxfp4), F32 (nf4) or BF16 "
        "(int4), and BF16, F16 or F32 without scales"
    )


@dataclass(frozen=True)
class Stored:
    """A tensor as a file header describes it; the first dtype is the one that is written."""

    dtypes: tuple[str, ...]
    shape: tuple[int, ...]


def stored_as(format_: Format, rows: int, cols: int) -> tuple[Stored, Stored]:
    """How a `[rows, cols]` matrix is stored in files: `NAME.weight` and `NAME.scale`."""
    if isinstance(format_, Fp8):
        scale = Stored(FP8_SCALES, format_.scale_shape(rows, cols))
        return Stored(("F8_E4M3",), (rows, cols)), scale
    if not isinstance(format_, FourBit) or type(format_) not in CODES_AND_SCALES:
        raise FormatError(f"{format_.name} is not stored in safetensors files as codes and scales")
    format_.expect_whole_blocks(cols)
    code_dtypes, scale_dtype = CODES_AND_SCALES[type(format_)]
    return Stored(code_dtypes, (rows, cols // 2)), Stored((scale_dtype,), format_.scale_shape(rows, cols))


def unpack(
    format_: Format, shape: tuple[int, int], codes: torch.Tensor, scales: torch.Tensor, scale_dtype: str
) -> PackedTensor:
    """A PackedTensor over the raw bytes (flat uint8) of `NAME.weight` and `NAME.scale`.

    bfloat16 scales of FP8 become float32, which holds them exactly.
    """
    weight, scale = stored_as(format_, *shape)
    values = scales.view(SCALE_DTYPES[scale_dtype]).view(scale.shape)
    if isinstance(format_, Fp8) and values.dtype == torch.bfloat16:
        values = values.float()
    return PackedTensor(format_, shape, codes.view(weight.shape), values)


def unpack_bytes(
    format_: Format, shape: tuple[int, int], codes: torch.Tensor, scales: torch.Tensor
) -> PackedTensor:
    """As `unpack`, with scales of the released dtype."""
    if isinstance(format_, Plain):
        return PackedTensor(format_, shape, codes.view(shape[0], -1))
    return unpack(format_, shape, codes, scales, stored_as(format_, *shape)[1].dtypes[0])
