"""Weights, experts and tolerances that the tests of Triton kernels share, interpreted or on a GPU."""

from __future__ import annotations

import torch

from quant.formats.fp8 import FP8_32, FP8_128
from quant.formats.int4 import INT4_32, INT4_128, INT4_OFFSET_32
from quant.formats.mxfp4 import MXFP4
from quant.formats.nf4 import NF4
from quant.kernels.interface import ExpertWeights
from quant.kernels.reference import ReferenceKernels
from quant.packed import Format, PackedTensor

FOUR_BIT = [MXFP4, NF4, INT4_32, INT4_128, INT4_OFFSET_32]
FORMATS: list[Format] = [*FOUR_BIT, FP8_32, FP8_128]
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
