"""Products in bfloat16: those of rounded numbers, and the same bits in any company."""

from __future__ import annotations

import pytest
import torch

from quant.errors import ConfigError
from quant.formats.fp8 import FP8_32, FP8_128
from quant.formats.mxfp4 import MXFP4
from quant.formats.nf4 import NF4
from quant.kernels.cpu import library
from quant.kernels.cpu.native import NativeKernels
from quant.kernels.devices import DeviceKernels
from quant.kernels.interface import ExpertBiases, ExpertExtras, MoeCall, Weight
from quant.kernels.reference import ReferenceKernels
from quant.packed import Format
from tests.quant.kernels.kernel_cases import (
    GGUF,
    NATIVE,
    any_weight,
    assert_summed_as_alone,
    difference,
    five_experts,
    name_of,
    weight,
)


def kernels_of(threads: int | None = None) -> NativeKernels:
    """Kernels in bfloat16; skips where this machine has none."""
    try:
        return NativeKernels("bf16", threads=threads)
    except (ConfigError, library.LibraryMissingError) as error:
        pytest.skip(str(error))


def rounded(x: torch.Tensor) -> torch.Tensor:
    """The nearest bfloat16, with all digits."""
    return x.bfloat16().double()


def expected_products(x: torch.Tensor, w: Weight) -> torch.Tensor:
    """Products of rounded numbers, exactly."""
    plain = w if isinstance(w, torch.Tensor) else w.decode()
    return rounded(x) @ rounded(plain).T


@pytest.mark.parametrize("format_", [*NATIVE, *GGUF, torch.bfloat16], ids=name_of)
def test_products_are_those_of_rounded_numbers(format_: Format | torch.dtype) -> None:
    kernels = kernels_of()
    w, x = any_weight(format_, 70, 768), torch.randn(29, 768)
    # the levels of NF4 as numbers of 21 bits round to another neighbour now and then
    tolerance = 1e-3 if format_ is NF4 else 3e-6
    for lies in (w, kernels.prepare(w)):  # in file layout and in panels
        assert difference(kernels.linear(x, lies), expected_products(x, w)) < tolerance


@pytest.mark.parametrize("format_", [MXFP4, FP8_32, FP8_128, torch.bfloat16], ids=name_of)
def test_many_columns_are_added_tile_by_tile(format_: Format | torch.dtype) -> None:
    kernels = kernels_of()
    w, x = any_weight(format_, 40, 5632), torch.randn(3, 5632)
    assert difference(kernels.linear(x, kernels.prepare(w)), expected_products(x, w)) < 1e-5


@pytest.mark.parametrize("format_", [*NATIVE, *GGUF, torch.bfloat16], ids=name_of)
def test_a_token_gets_the_same_bits_in_any_company(format_: Format | torch.dtype) -> None:
    kernels = kernels_of()
    w, x = kernels.prepare(any_weight(format_, 150, 512)), torch.randn(41, 512)
    together = kernels.linear(x, w)
    alone = torch.cat([kernels.linear(x[i : i + 1], w) for i in range(len(x))])
    assert torch.equal(together, alone)
    for threads in (1, 3, 16):
        assert torch.equal(together, kernels_of(threads).linear(x, w))


@pytest.mark.parametrize("cols", [2, 30, 100])
def test_plain_rows_of_any_even_length(cols: int) -> None:
    w, x = any_weight(torch.bfloat16, 13, cols), torch.randn(5, cols)
    assert difference(kernels_of().linear(x, w), expected_products(x, w)) < 3e-6


@pytest.mark.parametrize(("dtype", "cols"), [(torch.float32, 64), (torch.float16, 64), (torch.bfloat16, 33)])
def test_other_plain_rows_stay_exact(dtype: torch.dtype, cols: int) -> None:
    w, x = any_weight(dtype, 13, cols), torch.randn(5, cols)
    assert torch.equal(kernels_of().linear(x, w), NativeKernels().linear(x, w))


def test_plain_matrices_side_by_side_take_their_own_columns() -> None:
    x, weights = torch.randn(7, 3, 64), torch.randn(3, 40, 64).bfloat16()
    expected = torch.stack([expected_products(x[:, i], weights[i]) for i in range(3)], dim=1)
    assert difference(kernels_of().batched_linear(x, weights), expected) < 3e-6


@pytest.mark.parametrize("format_", [MXFP4, FP8_32], ids=name_of)
@pytest.mark.parametrize("has_biases", [False, True])
def test_experts_are_close_to_the_reference_and_need_no_company(format_: Format, has_biases: bool) -> None:
    kernels = kernels_of()
    hidden, width, tokens, top_k = 128, 96, 45, 2
    files, experts = five_experts(kernels, format_, hidden, width)
    shapes = ((5, width), (5, width), (5, hidden))
    biases = ExpertBiases(*(torch.randn(shape) for shape in shapes)) if has_biases else None
    extras = ExpertExtras(biases=biases)
    x, factors = torch.randn(tokens, hidden), torch.rand(tokens, top_k)
    ids = torch.stack([torch.randperm(5)[:top_k] for _ in range(tokens)])

    found = kernels.moe(MoeCall(x, ids, factors, experts, 7.0, extras))
    apart = kernels.moe_apart(MoeCall(x, ids, factors, experts, 7.0, extras))

    expected = ReferenceKernels().moe(MoeCall(x, ids, factors, files, 7.0, extras))
    assert 1e-5 < difference(found, expected) < 1e-2
    assert difference((apart * factors.unsqueeze(-1)).sum(1), found) < 1e-6
    some, outputs = torch.tensor([80, 3, 2, 44]), torch.zeros(tokens * top_k, hidden)
    kernels.moe_some(MoeCall(x, ids, factors, experts, 7.0, extras), some, outputs)
    assert torch.equal(outputs[some], apart.flatten(0, 1)[some])
    for t in range(tokens):
        part = slice(t, t + 1)
        call = MoeCall(x[part], ids[part], factors[part], experts, 7.0, extras)
        assert torch.equal(kernels.moe(call), found[part])
        assert torch.equal(kernels.moe_apart(call), apart[part])


def test_experts_of_thousands_of_tokens_are_summed_as_for_one() -> None:
    kernels = kernels_of()
    _, experts = five_experts(kernels, MXFP4, 256, 32)
    # so many that activations are packed several times
    assert_summed_as_alone(kernels, experts, tokens=2500)


def test_infinite_activations_are_not_hidden() -> None:
    x = torch.zeros(1, 256)
    x[0, 40] = torch.inf
    assert not kernels_of().linear(x, kernels_of().prepare(weight(MXFP4, 64, 256))).isfinite().any()


def test_a_level_without_bfloat16_refuses_it() -> None:
    with pytest.raises(ConfigError, match="AVX-512 BF16"):
        NativeKernels("bf16", "portable")


def test_a_processor_without_bfloat16_stays_exact_beside_a_gpu_that_has_it() -> None:
    kernels_of()
    host, gpu = NativeKernels(level="portable"), NativeKernels()
    both = DeviceKernels(host, {torch.device("meta"): gpu})
    with both.multiplying("bf16"):
        assert (host.activations, gpu.activations) == ("exact", "bf16")
    assert (host.activations, gpu.activations) == ("exact", "exact")


def test_products_are_exact_again_afterwards() -> None:
    kernels_of()
    kernels, x = NativeKernels(), torch.randn(3, 256)
    w = kernels.prepare(weight(MXFP4, 64, 256))
    exact = kernels.linear(x, w)
    with kernels.multiplying("bf16"):
        assert not torch.equal(kernels.linear(x, w), exact)
    assert torch.equal(kernels.linear(x, w), exact)
