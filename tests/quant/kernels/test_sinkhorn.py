"""Mixing matrices: the native kernel gives what the plain definition gives."""

from __future__ import annotations

import pytest
import torch

from quant.kernels.cpu.library import LibraryMissingError
from quant.kernels.cpu.native import NativeKernels
from quant.kernels.reference import ReferenceKernels


def native() -> NativeKernels:
    try:
        return NativeKernels()
    except LibraryMissingError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("iterations", [1, 2, 20])
@pytest.mark.parametrize("scale", [0.1, 3.0, 40.0])
def test_native_matrices_are_those_of_the_definition(n: int, iterations: int, scale: float) -> None:
    logits = torch.randn(37, n, n, generator=torch.Generator().manual_seed(n)) * scale
    before = logits.clone()
    expected = ReferenceKernels().sinkhorn(logits.double(), iterations, 1e-6)
    found = native().sinkhorn(logits, iterations, 1e-6)
    assert torch.equal(logits, before)
    assert (found - expected).abs().max() < 2e-6


def test_rows_and_columns_sum_to_one_in_the_end() -> None:
    logits = torch.randn(9, 4, 4, generator=torch.Generator().manual_seed(0))
    found = native().sinkhorn(logits.transpose(1, 2), 20, 1e-6)
    assert torch.allclose(found.sum(1), torch.ones(9, 4), atol=1e-4)
    assert torch.allclose(found.sum(2), torch.ones(9, 4), atol=1e-4)
