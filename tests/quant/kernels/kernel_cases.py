"""Weights, experts and tolerances that the tests of kernels share, native, interpreted or on a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from quant.formats import gguf
from quant.formats.fp8 import FP8_32, FP8_128
from quant.formats.gguf_levels import MXFP4_BLOCKS
from quant.formats.int4 import (
    INT4_32,
    INT4_128,
    INT4_HALF_GROUPS,
    INT4_OFFSET_32,
    INT4_OFFSET_FLOAT_GROUPS,
)
from quant.formats.mxfp4 import MXFP4
from quant.formats.nf4 import NF4
from quant.formats.nvfp4 import NVFP4
from quant.kernels.interface import ExpertWeights, Kernels, MoeCall, Weight
from quant.kernels.reference import ReferenceKernels
from quant.packed import Format, PackedTensor

FOUR_BIT = [MXFP4, NF4, INT4_32, INT4_128, INT4_OFFSET_32]
FORMATS: list[Format] = [*FOUR_BIT, FP8_32, FP8_128]
# What only the native kernels multiply with.
NATIVE: list[Format] = [*FORMATS, INT4_HALF_GROUPS[64], INT4_OFFSET_FLOAT_GROUPS[32], NVFP4]
GGUF: list[Format] = list(gguf.FORMATS.values())
# Where blocks have their float16 scales: first, but for these.
GGUF_SCALES = {
    "q4_1": [0, 2], "q5_1": [0, 2], "q2_k": [80, 82], "q3_k": [108], "q4_k": [0, 2], "q5_k": [0, 2],
    "q6_k": [208],
}  # fmt: skip
# Relative to the largest result: float32 sums in another order; bfloat16 results are rounded.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 8e-3}
REFERENCE = ReferenceKernels()


def weight(format_: Format, rows: int, cols: int, device: str = "cpu") -> PackedTensor:
    """A random weight whose scales differ by orders of magnitude from row to row."""
    torch.manual_seed(rows * cols)
    values = torch.randn(rows, cols) * torch.linspace(-2, 2, rows).exp().unsqueeze(1)
    packed = format_.encode(values)
    assert packed.scales is not None
    return PackedTensor(format_, packed.shape, packed.codes.to(device), packed.scales.to(device))


def gguf_weight(format_: Format, rows: int, cols: int) -> PackedTensor:
    """Random codes under scales that are plain numbers."""
    torch.manual_seed(rows + cols)
    codes = torch.randint(0, 256, (rows, format_.bytes_for(1, cols)), dtype=torch.uint8)
    blocks = codes.view(rows, cols // format_.tile_cols, -1)
    if format_ is MXFP4_BLOCKS:
        blocks[..., 0] = torch.randint(120, 134, blocks.shape[:-1], dtype=torch.uint8)
    else:
        for place in GGUF_SCALES.get(format_.name, [0]):
            scales = torch.rand(*blocks.shape[:-1], 1).add(0.1).mul(0.02).half()
            blocks[..., place : place + 2] = scales.view(torch.uint8)
    return PackedTensor(format_, (rows, cols), codes)


def any_weight(format_: Format | torch.dtype, rows: int, cols: int) -> Weight:
    """A random weight in a format of any kind, or plain."""
    if isinstance(format_, torch.dtype):
        torch.manual_seed(rows)
        return torch.randn(rows, cols).to(format_)
    return gguf_weight(format_, rows, cols) if format_ in GGUF else weight(format_, rows, cols)


def name_of(value: object) -> str:
    """What pytest calls a case."""
    return value.name if isinstance(value, Format) else str(value)


def expert(format_: Format, hidden: int, width: int, seed: int, device: str = "cpu") -> ExpertWeights:
    """A random expert."""
    torch.manual_seed(seed)
    parts = []
    for rows, cols in ((width, hidden), (width, hidden), (hidden, width)):
        packed = format_.encode(torch.randn(rows, cols) / cols**0.5)
        assert packed.scales is not None
        parts.append(PackedTensor(format_, (rows, cols), packed.codes.to(device), packed.scales.to(device)))
    return ExpertWeights(*parts)


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, relative to the largest expected value."""
    expected = expected.float()
    return ((found.float() - expected).abs().max() / expected.abs().max()).item()


def five_experts(
    kernels: Kernels, format_: Format, hidden: int, width: int
) -> tuple[list[ExpertWeights], list[ExpertWeights]]:
    """Random experts as files have them, and the same in slots."""
    layout = kernels.slot_layout(hidden, width, format_)
    files = [expert(format_, hidden, width, seed) for seed in range(5)]
    slots = [torch.zeros(layout.nbytes, dtype=torch.uint8) for _ in files]
    return files, [layout.pack_into(slot, *e.matrices) for slot, e in zip(slots, files, strict=True)]


def assert_summed_as_alone(kernels: Kernels, experts: Sequence[ExpertWeights], *, tokens: int) -> None:
    """Tokens among many get the bits that they get alone: of two of five experts with 256 inputs each."""
    x, factors = torch.randn(tokens, 256), torch.rand(tokens, 2)
    ids = torch.stack([torch.randperm(5)[:2] for _ in range(tokens)])
    found = kernels.moe(MoeCall(x, ids, factors, experts, 7.0))
    for t in (0, 7, tokens - 1):
        alone = kernels.moe(MoeCall(x[t : t + 1], ids[t : t + 1], factors[t : t + 1], experts, 7.0))
        assert torch.equal(found[t : t + 1], alone)
