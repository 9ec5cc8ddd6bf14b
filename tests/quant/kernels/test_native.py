"""The native back end on every level that this machine has: right, and the same bits in any company."""

from __future__ import annotations

import pytest
import torch

from quant.formats.fp8 import FP8_32, FP8_128, FP8_ROW
from quant.formats.mxfp4 import MXFP4
from quant.formats.nf4 import NF4
from quant.formats.plain import as_packed
from quant.kernels.cpu import library
from quant.kernels.cpu.native import NativeKernels
from quant.kernels.interface import MoeCall
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

try:
    LEVELS = library.available_levels()
except library.LibraryMissingError as missing:
    pytest.skip(str(missing), allow_module_level=True)

REFERENCE = ReferenceKernels()
DENSE = [torch.bfloat16, torch.float16, torch.float32]
# Relative to the largest result. Exact mode keeps 21 bits of each block of activations, int8 mode eight.
EXACT, INT8 = 5e-6, 1.5e-2

pytestmark = pytest.mark.parametrize("level", LEVELS)


@pytest.mark.parametrize("format_", [*NATIVE, *GGUF, *DENSE], ids=name_of)
@pytest.mark.parametrize(("rows", "cols"), [(70, 256), (256, 768)])
def test_products_equal_the_reference(
    level: str, format_: Format | torch.dtype, rows: int, cols: int
) -> None:
    kernels = NativeKernels(level=level)
    w = any_weight(format_, rows, cols)
    x = torch.randn(11, cols)
    expected = REFERENCE.linear(x, w)
    for lies in (w, kernels.prepare(w)):  # in file layout and in panels
        assert difference(kernels.linear(x, lies), expected) < EXACT


@pytest.mark.parametrize("format_", [*NATIVE, *GGUF], ids=name_of)
def test_int8_activations_stay_close(level: str, format_: Format) -> None:
    kernels = NativeKernels("int8", level)
    w = any_weight(format_, 256, 768)
    x = torch.randn(11, 768)
    assert difference(kernels.linear(x, kernels.prepare(w)), REFERENCE.linear(x, w)) < INT8


@pytest.mark.parametrize("activations", ["exact", "int8"])
@pytest.mark.parametrize("format_", [*NATIVE, *GGUF, *DENSE], ids=name_of)
def test_a_token_gets_the_same_bits_in_any_company(
    level: str, format_: Format | torch.dtype, activations: str
) -> None:
    kernels = NativeKernels("int8" if activations == "int8" else "exact", level)
    w = kernels.prepare(any_weight(format_, 150, 512))
    x = torch.randn(19, 512)
    together = kernels.linear(x, w)
    alone = torch.cat([kernels.linear(x[i : i + 1], w) for i in range(len(x))])
    assert torch.equal(together, alone)
    single_thread = NativeKernels(kernels.activations, level, threads=1)
    assert torch.equal(together, single_thread.linear(x, w))


@pytest.mark.parametrize("cols", [129, 334])
@pytest.mark.parametrize("format_", [FP8_32, FP8_128], ids=name_of)
def test_fp8_of_a_prompt_gives_the_bits_of_a_single_token(level: str, format_: Format, cols: int) -> None:
    kernels = NativeKernels(level=level)
    w, x = kernels.prepare(any_weight(format_, 70, cols)), torch.randn(270, cols)
    together = kernels.linear(x, w)
    for i in (0, 5, 6, 255, 256, 269):
        assert torch.equal(together[i : i + 1], kernels.linear(x[i : i + 1], w))


@pytest.mark.parametrize("format_", [MXFP4, FP8_32, torch.bfloat16], ids=name_of)
def test_weights_side_by_side_give_the_bits_of_each(level: str, format_: Format | torch.dtype) -> None:
    kernels = NativeKernels(level=level)
    weights = [kernels.prepare(any_weight(format_, 40, 128)) for _ in range(3)]
    for tokens in (1, 3, 70):
        x = torch.randn(tokens, 3 * 128)
        each = [kernels.linear(x[:, 128 * n : 128 * (n + 1)], weight) for n, weight in enumerate(weights)]
        assert torch.equal(kernels.linear_blocks(x, weights), torch.cat(each, dim=1))


@pytest.mark.parametrize("cols", [2, 30, 33, 100])
@pytest.mark.parametrize("dtype", DENSE, ids=str)
def test_plain_rows_of_any_length(level: str, dtype: torch.dtype, cols: int) -> None:
    w, x = any_weight(dtype, 13, cols), torch.randn(5, cols)
    assert difference(NativeKernels(level=level).linear(x, w), REFERENCE.linear(x, w)) < EXACT


@pytest.mark.parametrize("dtype", DENSE, ids=str)
def test_plain_rows_as_a_packed_tensor_give_the_same_bits(level: str, dtype: torch.dtype) -> None:
    kernels = NativeKernels(level=level)
    w, x = any_weight(dtype, 70, 100), torch.randn(5, 100)
    assert isinstance(w, torch.Tensor)
    assert torch.equal(kernels.linear(x, as_packed(w)), kernels.linear(x, w))


@pytest.mark.parametrize("format_", [MXFP4, NF4], ids=name_of)
@pytest.mark.parametrize("tokens", [1, 7])
def test_experts_equal_the_reference_and_need_no_company(level: str, format_: Format, tokens: int) -> None:
    kernels = NativeKernels(level=level)
    files, experts = five_experts(kernels, format_, 128, 96 if format_ is MXFP4 else 64)
    x = torch.randn(tokens, 128)
    ids = torch.stack([torch.randperm(5)[:2] for _ in range(tokens)])
    factors = torch.rand(tokens, 2)
    found = kernels.moe(MoeCall(x, ids, factors, experts, 7.0))
    assert difference(found, REFERENCE.moe(MoeCall(x, ids, factors, files, 7.0))) < 3 * EXACT
    for t in range(tokens):
        alone = kernels.moe(MoeCall(x[t : t + 1], ids[t : t + 1], factors[t : t + 1], experts, 7.0))
        assert torch.equal(found[t : t + 1], alone)


def test_experts_of_thousands_of_tokens_are_summed_as_for_one(level: str) -> None:
    kernels = NativeKernels(level=level)
    _, experts = five_experts(kernels, MXFP4, 256, 32)
    # so many that products are summed before all experts are done
    assert_summed_as_alone(kernels, experts, tokens=2200)


def test_rows_are_gathered_as_they_decode(level: str) -> None:
    table = weight(FP8_ROW, 300, 256)
    rows = torch.randint(0, 300, (700,))
    assert torch.equal(NativeKernels(level=level).gather_rows(table, rows), table.decode()[rows])


def test_infinite_activations_are_not_hidden(level: str) -> None:
    kernels = NativeKernels(level=level)
    x = torch.zeros(1, 256)
    x[0, 40] = torch.inf
    assert not kernels.linear(x, kernels.prepare(weight(MXFP4, 64, 256))).isfinite().any()
