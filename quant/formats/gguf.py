"""GGUF types by name, and the weights that tensors of these types are.

The bits are documented in `gguf_legacy.py`, `gguf_k.py` and `gguf_levels.py`; F32, F16 and BF16 are plain
tensors.
"""

from __future__ import annotations

import math

import torch

from quant.errors import FormatError
from quant.formats.gguf_blocks import GgufFormat
from quant.formats.gguf_k import Q2_K, Q3_K, Q4_K, Q5_K, Q6_K
from quant.formats.gguf_legacy import Q4_0, Q4_1, Q5_0, Q5_1, Q8_0
from quant.formats.gguf_levels import IQ4_NL, IQ4_XS, MXFP4_BLOCKS
from quant.packed import PackedTensor

# Type names as GGUF files state them.
FORMATS: dict[str, GgufFormat] = {
    "Q4_0": Q4_0, "Q4_1": Q4_1, "Q5_0": Q5_0, "Q5_1": Q5_1, "Q8_0": Q8_0,
    "Q2_K": Q2_K, "Q3_K": Q3_K, "Q4_K": Q4_K, "Q5_K": Q5_K, "Q6_K": Q6_K,
    "IQ4_NL": IQ4_NL, "IQ4_XS": IQ4_XS, "MXFP4": MXFP4_BLOCKS,
}  # fmt: skip
PLAIN_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def weight_from_bytes(dtype: str, shape: tuple[int, ...], data: torch.Tensor) -> torch.Tensor | PackedTensor:
    """A tensor of GGUF type `dtype` over its bytes, not copied where they are aligned.

    `data` is uint8 `[nbytes]`; a packed type needs a `[rows, cols]` shape. Raises FormatError for a
    type that is not read and for bytes that do not fit the shape.
    """
    if dtype in PLAIN_DTYPES:
        plain = PLAIN_DTYPES[dtype]
        if data.numel() != math.prod(shape) * plain.itemsize:
            raise FormatError(f"{dtype}: {data.numel()} bytes, expected {math.prod(shape) * plain.itemsize}")
        aligned = data.data_ptr() % plain.itemsize == 0 and data.storage_offset() % plain.itemsize == 0
        return (data if aligned else data.clone()).view(plain).view(shape)
    if dtype not in FORMATS:
        raise FormatError(
            f"GGUF type {dtype} is not supported; known: {', '.join((*FORMATS, *PLAIN_DTYPES))}"
        )
    if len(shape) != 2:
        raise FormatError(f"{dtype}: shape {list(shape)}, expected a matrix")
    rows, cols = shape
    format_ = FORMATS[dtype]
    row_bytes = format_.bytes_for(1, cols)
    format_.expect("bytes", data.numel(), rows * row_bytes)
    return PackedTensor(format_, (rows, cols), data.view(rows, row_bytes))
