"""Triton kernels in Triton's interpreter, against plain torch.

Runs where TRITON_INTERPRET is set before triton is imported: `tests/quant/kernels/test_triton.py` starts it
so.
The interpreter multiplies bfloat16 matrices wrongly (it takes their bits for integers), so tensor core
tiles are tested in float32 here and in bfloat16 by `tests/gpu`.
"""

from __future__ import annotations

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs in Triton's interpreter, started by test_triton.py", allow_module_level=True)

from quant.errors import FormatError
from quant.formats.fp8 import FP8_32, FP8_128, FP8_ROW
from quant.formats.gguf_legacy import Q8_0
from quant.formats.int4 import INT4_32, INT4_OFFSET_32
from quant.formats.mxfp4 import MXFP4
from quant.formats.nf4 import NF4
from quant.kernels.cuda import kernels
from quant.kernels.cuda.kernels import TritonKernels
from quant.kernels.cuda.linear import Blocks
from quant.kernels.cuda.moe import schedule
from quant.kernels.file_slots import FileSlotLayout
from quant.kernels.interface import MoeCall
from quant.packed import Format, PackedTensor
from tests.quant.kernels.kernel_cases import (
    FORMATS,
    FOUR_BIT,
    REFERENCE,
    TOLERANCE,
    any_weight,
    difference,
    expert,
    name_of,
    weight,
)

TRITON = TritonKernels(torch.device("cpu"))
formats = pytest.mark.parametrize("format_", FORMATS, ids=lambda f: f.name)
four_bit = pytest.mark.parametrize("format_", FOUR_BIT, ids=lambda f: f.name)


@formats
@pytest.mark.parametrize("tokens", [1, 3, 5, 40])
def test_linear_equals_the_reference(format_: Format, tokens: int) -> None:
    w = weight(format_, 21, 384)
    x = torch.randn(tokens, 384)
    assert difference(TRITON.linear(x, w), REFERENCE.linear(x, w)) < TOLERANCE[torch.float32]


@formats
def test_one_bfloat16_token_equals_the_reference(format_: Format) -> None:
    w = weight(format_, 16, 256)
    x = torch.randn(1, 256).bfloat16()
    found = TRITON.linear(x, w)
    assert found.dtype == torch.bfloat16
    assert difference(found, REFERENCE.linear(x.float(), w)) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("format_", [FP8_32, FP8_128], ids=lambda f: f.name)
def test_tiles_that_the_matrix_cuts_are_multiplied_as_far_as_they_go(format_: Format, tokens: int) -> None:
    w = weight(format_, 45, 150)
    x = torch.randn(tokens, 150)
    assert difference(TRITON.linear(x, w), REFERENCE.linear(x, w)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("tokens", [1, 3])
def test_float_scales_of_fp8_are_used(tokens: int) -> None:
    values = torch.randn(24, 256)
    w = FP8_128.encode(values, FP8_128.float_scales(values))
    x = torch.randn(tokens, 256)
    assert difference(TRITON.linear(x, w), REFERENCE.linear(x, w)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("code", [0, 1, 100, 252])
@pytest.mark.parametrize("format_", [MXFP4, FP8_32], ids=lambda f: f.name)
def test_extreme_power_of_two_scales_are_exact(format_: Format, code: int) -> None:
    w = weight(format_, 32, 32)
    assert w.scales is not None
    w.scales.fill_(min(code, 246))
    x = torch.eye(32)[:1]
    assert torch.equal(TRITON.linear(x, w), w.decode()[:, 0].unsqueeze(0))


def test_leading_axes_are_kept_and_no_tokens_give_no_rows() -> None:
    w = weight(MXFP4, 32, 64)
    assert TRITON.linear(torch.randn(2, 3, 64), w).shape == (2, 3, 32)
    assert TRITON.linear(torch.randn(0, 64), w).shape == (0, 32)


@pytest.mark.parametrize("tokens", [1, 3, 20])
@pytest.mark.parametrize("cols", [64, 150, 2100])
def test_bfloat16_weights_are_multiplied_with_float32(tokens: int, cols: int) -> None:
    plain = torch.randn(21, cols).bfloat16()
    x = torch.randn(tokens, cols)
    found = TRITON.linear(x, plain)
    assert found.dtype == torch.float32
    assert difference(found, REFERENCE.linear(x, plain)) < TOLERANCE[torch.float32]


def test_other_plain_weights_and_formats_without_kernel_go_through_torch() -> None:
    x = torch.randn(2, 64)
    for dtype in (torch.float32, torch.float16):
        plain = torch.randn(8, 64).to(dtype)
        assert torch.equal(TRITON.linear(x, plain), REFERENCE.linear(x, plain))
    blocks = torch.zeros(8, 68, dtype=torch.uint8)
    gguf = PackedTensor(Q8_0, (8, 64), blocks)
    assert torch.equal(TRITON.linear(x, gguf), torch.zeros(2, 8))


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("turns", [1, 20])
def test_mixing_matrices_are_those_of_the_definition(n: int, turns: int) -> None:
    logits = torch.randn(37, n, n, generator=torch.Generator().manual_seed(n)) * 3
    expected = REFERENCE.sinkhorn(logits.double(), turns, 1e-6)
    found = TRITON.sinkhorn(logits.transpose(1, 2), turns, 1e-6).double()
    assert (TRITON.sinkhorn(logits, turns, 1e-6) - expected).abs().max() < 2e-6
    assert (found - REFERENCE.sinkhorn(logits.transpose(1, 2).double(), turns, 1e-6)).abs().max() < 2e-6
    assert TRITON.sinkhorn(logits[:0], turns, 1e-6).shape == (0, n, n)


@four_bit
@pytest.mark.parametrize("tokens", [1, 30])
def test_experts_equal_the_reference(format_: Format, tokens: int) -> None:
    experts = {e: expert(format_, 128, 128, e) for e in range(5)}
    torch.manual_seed(tokens)
    x = torch.randn(tokens, 128) * 3
    ids = torch.stack([torch.randperm(5)[:3] for _ in range(tokens)])
    weights = torch.rand(tokens, 3)
    found = TRITON.moe(MoeCall(x, ids, weights, experts, 1.5))
    assert difference(found, REFERENCE.moe(MoeCall(x, ids, weights, experts, 1.5))) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("format_", [MXFP4, INT4_OFFSET_32], ids=name_of)
def test_experts_equal_the_reference_by_one_pass_over_x_and_some_columns_at_a_time(
    format_: Format, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Blocks, "of", classmethod(lambda cls, *_: cls(16, 64, 64, 4, shares_x=True)))
    monkeypatch.setattr(kernels, "MOST_OUTPUTS", 1)
    experts = {e: expert(format_, 256, 64, e) for e in range(2)}
    x, weights = torch.randn(20, 256), torch.rand(20, 2)
    ids = torch.stack([torch.randperm(2) for _ in range(20)])
    call = MoeCall(x, ids, weights, experts, 1.5)
    assert difference(TRITON.moe(call), REFERENCE.moe(call)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("format_", [MXFP4, FP8_32, torch.bfloat16], ids=name_of)
def test_products_in_bfloat16_round_activations_and_nothing_else(format_: Format | torch.dtype) -> None:
    w, x = any_weight(format_, 21, 384), torch.randn(3, 384)
    with TRITON.multiplying("bf16"):
        found = TRITON.linear(x, w)
    expected = REFERENCE.linear(x.bfloat16().float(), w)
    assert found.dtype == torch.float32
    assert difference(found, expected) < TOLERANCE[torch.float32]
    assert not torch.equal(TRITON.linear(x, w), found)


def test_experts_in_bfloat16_stay_close() -> None:
    experts = {e: expert(MXFP4, 128, 128, e) for e in range(5)}
    x, ids, weights = torch.randn(2, 128), torch.tensor([[0, 3], [4, 1]]), torch.rand(2, 2)
    call = MoeCall(x, ids, weights, experts, 10.0)
    with TRITON.multiplying("bf16"):
        found = TRITON.moe(call)
    assert found.dtype == torch.float32
    assert TOLERANCE[torch.float32] < difference(found, REFERENCE.moe(call)) < TOLERANCE[torch.bfloat16]


def test_experts_are_run_from_slots_of_an_arena() -> None:
    layout = FileSlotLayout(128, 96)
    arena = torch.zeros(6, layout.nbytes, dtype=torch.uint8)
    slots = [4, 0, 3]
    experts = {}
    for e, slot in enumerate(slots):
        source = expert(MXFP4, 128, 96, e)
        experts[e] = layout.pack_into(arena[slot], source.w1, source.w3, source.w2)
    x = torch.randn(4, 128)
    ids = torch.tensor([[0, 2], [1, 0], [2, 1], [0, 1]])
    weights = torch.rand(4, 2)
    expected = REFERENCE.moe(MoeCall(x, ids, weights, experts, 10.0))
    assert (
        difference(TRITON.moe(MoeCall(x, ids, weights, experts, 10.0)), expected) < TOLERANCE[torch.float32]
    )


@pytest.mark.parametrize("offset", [4, 1])
def test_slots_begin_at_a_word_or_are_refused(offset: int) -> None:
    layout = FileSlotLayout(64, 32)
    arena = torch.zeros(2 * layout.nbytes + offset, dtype=torch.uint8)[offset:].view(2, -1)
    experts = {}
    for e in range(2):
        source = expert(MXFP4, 64, 32, e)
        experts[e] = layout.pack_into(arena[e], source.w1, source.w3, source.w2)
    x, ids, weights = torch.randn(1, 64), torch.tensor([[1, 0]]), torch.rand(1, 2)
    if offset == 1:
        with pytest.raises(FormatError, match="must begin at a multiple of 4 bytes"):
            TRITON.moe(MoeCall(x, ids, weights, experts, 10.0))
        return
    expected = REFERENCE.moe(MoeCall(x, ids, weights, experts, 10.0))
    assert (
        difference(TRITON.moe(MoeCall(x, ids, weights, experts, 10.0)), expected) < TOLERANCE[torch.float32]
    )


def test_experts_of_different_formats_in_one_layer_are_refused() -> None:
    experts = {0: expert(MXFP4, 64, 64, 0), 1: expert(NF4, 64, 64, 1)}
    with pytest.raises(FormatError, match="experts in mxfp4 and nf4 in one layer"):
        TRITON.moe(MoeCall(torch.randn(1, 64), torch.tensor([[0, 1]]), torch.rand(1, 2), experts, 10.0))


def test_experts_of_no_tokens_give_no_rows() -> None:
    empty = torch.zeros(0, 2, dtype=torch.int64)
    assert TRITON.moe(MoeCall(torch.zeros(0, 64), empty, empty.float(), {}, 10.0)).shape == (0, 64)


def test_schedule_gives_every_pair_to_one_tile_of_its_expert() -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, 7, (50, 4))
    plan = schedule(ids, torch.float32)
    seen = []
    for index, start, stop in plan.tiles.tolist():
        assert 0 < stop - start <= plan.blocks.tokens
        pairs = plan.pairs[start:stop].tolist()
        assert {int(ids.flatten()[pair]) for pair in pairs} == {plan.experts[index]}
        seen += pairs
    assert sorted(seen) == list(range(200))


@pytest.mark.parametrize("format_", [FP8_ROW, MXFP4, NF4, INT4_32], ids=lambda f: f.name)
@pytest.mark.parametrize("cols", [64, 320])
def test_gathered_rows_are_exact(format_: Format, cols: int) -> None:
    table = weight(format_, 50, cols)
    rows = torch.tensor([7, 0, 49, 7, 12, 3, 3, 3, 48, 1, 2])
    assert torch.equal(TRITON.gather_rows(table, rows), REFERENCE.gather_rows(table, rows))
    assert TRITON.gather_rows(table, rows[:0]).shape == (0, cols)


def test_tables_whose_rows_share_scales_are_refused() -> None:
    with pytest.raises(FormatError, match="no Triton kernel gathers rows"):
        TRITON.gather_rows(weight(FP8_32, 64, 64), torch.tensor([1]))
