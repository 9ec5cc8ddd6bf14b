"""Triton kernels and bitsandbytes on a real GPU, against plain torch on the CPU."""

from __future__ import annotations

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
pytest.importorskip("triton", reason="triton is not installed (extra `gpu`)")

from bitsandbytes import functional as bnb

from quant.formats.fp8 import FP8_ROW
from quant.formats.mxfp4 import MXFP4
from quant.formats.nf4 import NF4
from quant.kernels.cuda import kernels
from quant.kernels.cuda.kernels import TritonKernels
from quant.kernels.interface import ExpertWeights, MoeCall
from quant.packed import Format, PackedTensor
from tests.quant.kernels.kernel_cases import (
    FORMATS,
    FOUR_BIT,
    REFERENCE,
    TOLERANCE,
    difference,
    expert,
    weight,
)

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda", 0)
TRITON = TritonKernels(GPU)
formats = pytest.mark.parametrize("format_", FORMATS, ids=lambda f: f.name)
four_bit = pytest.mark.parametrize("format_", FOUR_BIT, ids=lambda f: f.name)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def on_gpu(packed: PackedTensor) -> PackedTensor:
    moved = TRITON.prepare(packed)
    assert isinstance(moved, PackedTensor)
    return moved


@formats
@dtypes
@pytest.mark.parametrize("tokens", [1, 3, 7, 16, 30, 200])
def test_linear_equals_the_reference(format_: Format, dtype: torch.dtype, tokens: int) -> None:
    w = weight(format_, 1000, 1280)
    x = torch.randn(tokens, 1280).to(dtype)
    found = TRITON.linear(x.to(GPU), on_gpu(w))
    assert found.dtype == dtype
    assert difference(found.cpu(), REFERENCE.linear(x.float(), w)) < TOLERANCE[dtype]


@pytest.mark.parametrize("tokens", [1, 3, 16, 200])
def test_bfloat16_weights_are_multiplied_with_float32(tokens: int) -> None:
    plain = torch.randn(1000, 1280).bfloat16()
    x = torch.randn(tokens, 1280)
    found = TRITON.linear(x.to(GPU), plain.to(GPU)).cpu()
    assert difference(found, REFERENCE.linear(x, plain)) < TOLERANCE[torch.float32]


def test_mixing_matrices_equal_the_reference() -> None:
    logits = torch.randn(300, 4, 4) * 3
    found = TRITON.sinkhorn(logits.to(GPU), 20, 1e-6).cpu()
    assert (found - REFERENCE.sinkhorn(logits, 20, 1e-6)).abs().max() < 2e-6


@four_bit
@dtypes
@pytest.mark.parametrize("tokens", [1, 9, 300])
def test_experts_equal_the_reference(format_: Format, dtype: torch.dtype, tokens: int) -> None:
    experts = {e: expert(format_, 512, 384, e) for e in range(8)}
    moved = {e: ExpertWeights(on_gpu(w.w1), on_gpu(w.w3), on_gpu(w.w2)) for e, w in experts.items()}
    torch.manual_seed(tokens)
    x = torch.randn(tokens, 512).to(dtype)
    ids = torch.stack([torch.randperm(8)[:6] for _ in range(tokens)])
    weights = torch.rand(tokens, 6)
    found = TRITON.moe(MoeCall(x.to(GPU), ids.to(GPU), weights.to(GPU), moved, 1.0))
    expected = REFERENCE.moe(MoeCall(x.float(), ids, weights, experts, 1.0))
    # Between the two matrices bfloat16 rounds once more.
    assert difference(found.cpu(), expected) < 2 * TOLERANCE[dtype]


@formats
@pytest.mark.parametrize("tokens", [1, 16, 64, 200])
def test_products_in_bfloat16_keep_float32_results(format_: Format, tokens: int) -> None:
    w, x = weight(format_, 1000, 1280), torch.randn(tokens, 1280)
    with TRITON.multiplying("bf16"):
        found = TRITON.linear(x.to(GPU), on_gpu(w))
    assert found.dtype == torch.float32
    expected = REFERENCE.linear(x.bfloat16().float(), w)
    assert difference(found.cpu(), expected) < TOLERANCE[torch.bfloat16]


@four_bit
@pytest.mark.parametrize("tokens", [2, 300])
def test_experts_in_bfloat16_are_computed_some_columns_at_a_time(
    format_: Format, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "MOST_OUTPUTS", 2 * tokens * 256)
    experts = {e: expert(format_, 640, 512, e) for e in range(3)}
    moved = {e: ExpertWeights(*map(on_gpu, one.matrices)) for e, one in experts.items()}
    x, weights = torch.randn(tokens, 640), torch.rand(tokens, 2)
    ids = torch.stack([torch.randperm(3)[:2] for _ in range(tokens)])
    with TRITON.multiplying("bf16"):
        found = TRITON.moe(MoeCall(x.to(GPU), ids.to(GPU), weights.to(GPU), moved, 1.0))
    expected = REFERENCE.moe(MoeCall(x, ids, weights, experts, 1.0))
    assert difference(found.cpu(), expected) < 2 * TOLERANCE[torch.bfloat16]


def test_a_token_gets_the_same_answer_twice() -> None:
    moved = {e: expert(MXFP4, 256, 128, e, "cuda") for e in range(4)}
    x, ids, weights = torch.randn(64, 256, device=GPU), torch.randint(0, 4, (64, 3)), torch.rand(64, 3)
    first, second = (TRITON.moe(MoeCall(x, ids, weights.to(GPU), moved, 10.0)) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("format_", [FP8_ROW, MXFP4], ids=lambda f: f.name)
def test_rows_are_gathered_from_pinned_host_memory(format_: Format) -> None:
    table = weight(format_, 5000, 256)
    assert table.scales is not None
    pinned = PackedTensor(format_, table.shape, table.codes.pin_memory(), table.scales.pin_memory())
    rows = torch.randint(0, 5000, (333,))
    assert torch.equal(TRITON.gather_rows(pinned, rows).cpu(), REFERENCE.gather_rows(table, rows))


def test_bitsandbytes_on_the_gpu_packs_as_we_do() -> None:
    torch.manual_seed(0)
    values = torch.randn(256, 512)
    codes, state = bnb.quantize_nf4(values.to(GPU), blocksize=64)
    packed = NF4.encode(values)
    assert packed.scales is not None
    assert torch.equal(packed.scales, state.absmax.cpu().view(256, 8))
    # A value halfway between two levels may go either way.
    theirs = PackedTensor(NF4, (256, 512), codes.cpu().view(256, 256), packed.scales)
    assert ((theirs.decode() - values).abs() <= (packed.decode() - values).abs() + 1e-6).all()
    assert (codes.cpu().view(256, 256) != packed.codes).float().mean() < 1e-3


def test_bitsandbytes_multiplies_as_we_do() -> None:
    w = on_gpu(weight(NF4, 768, 1024))
    assert w.scales is not None
    state = bnb.QuantState(
        absmax=w.scales.flatten(), shape=torch.Size(w.shape), code=NF4.levels.to(GPU),
        blocksize=64, quant_type="nf4", dtype=torch.bfloat16,
    )  # fmt: skip
    x = torch.randn(1, 1024, device=GPU).bfloat16()
    theirs = x @ bnb.dequantize_4bit(w.codes.view(-1, 1), state).T
    assert difference(TRITON.linear(x, w), theirs) < 2 * TOLERANCE[torch.bfloat16]
