"""RMSNorm: the native kernel gives what the definition gives, in whatever shape it is asked."""

from __future__ import annotations

import pytest
import torch

from quant.kernels.cpu.library import LibraryMissingError
from quant.kernels.cpu.native import NativeKernels
from quant.kernels.reference import ReferenceKernels


@pytest.fixture(scope="module")
def native() -> NativeKernels:
    try:
        return NativeKernels(threads=2)
    except LibraryMissingError as error:
        pytest.skip(str(error))


def exact(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    normed = x.double() / (x.double().square().mean(-1, keepdim=True) + eps).sqrt()
    return normed if weight is None else normed * weight


@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 15), (3, 16), (2, 5, 100), (1, 20_480), (70, 1030), (0, 8)], ids=str
)
@pytest.mark.parametrize("has_weight", [True, False])
def test_rows_are_divided_by_the_root_of_their_mean_square(
    native: NativeKernels, shape: tuple[int, ...], has_weight: bool
) -> None:
    generator = torch.Generator().manual_seed(1)
    x = 3 * torch.randn(shape, generator=generator)
    weight = torch.randn(shape[-1], generator=generator) if has_weight else None
    before = x.clone()
    found = native.rms_norm(x, weight, 1e-6)
    assert found.shape == x.shape
    assert torch.equal(x, before)
    assert torch.allclose(found.double(), exact(x, weight, 1e-6), rtol=1e-6, atol=1e-6)


def test_a_row_has_the_same_bits_alone_and_among_others(native: NativeKernels) -> None:
    x = torch.randn(90, 1000)
    together = native.rms_norm(x, None, 1e-6)
    assert all(
        torch.equal(native.rms_norm(x[at : at + 1], None, 1e-6)[0], together[at]) for at in (0, 41, 89)
    )


def test_rows_of_zeros_stay_zeros(native: NativeKernels) -> None:
    assert torch.equal(native.rms_norm(torch.zeros(2, 40), None, 1e-20), torch.zeros(2, 40))


def test_other_dtypes_go_through_torch(native: NativeKernels) -> None:
    x = torch.randn(6, 64).bfloat16()
    assert torch.equal(native.rms_norm(x, None, 1e-6), ReferenceKernels().rms_norm(x, None, 1e-6))


def test_rows_that_lie_apart_give_what_they_give_side_by_side(native: NativeKernels) -> None:
    x = torch.randn(6, 64)
    for strided in (x.t(), x[:, ::2]):
        assert torch.equal(
            native.rms_norm(strided, None, 1e-6), native.rms_norm(strided.contiguous(), None, 1e-6)
        )
