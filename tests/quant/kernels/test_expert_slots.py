"""Experts in slots whatever their formats, also where matrices differ: right, and alone as in company."""

from __future__ import annotations

import pytest
import torch

from quant.errors import FormatError
from quant.formats.fp8 import FP8_128, FP8_ROW
from quant.formats.gguf_k import Q2_K, Q3_K, Q4_K, Q5_K, Q6_K
from quant.formats.gguf_legacy import Q8_0
from quant.formats.gguf_levels import IQ4_NL, IQ4_XS, MXFP4_BLOCKS
from quant.formats.int4 import INT4_HALF_GROUPS
from quant.formats.mxfp4 import MXFP4
from quant.formats.nvfp4 import NVFP4
from quant.formats.plain import BF16, F16, F32, Plain
from quant.kernels.cpu import library
from quant.kernels.cpu.native import NativeKernels
from quant.kernels.cpu.panel_slots import ExpertSlotLayout
from quant.kernels.file_slots import FileSlotLayout
from quant.kernels.interface import (
    ExpertBiases,
    ExpertExtras,
    ExpertFormats,
    ExpertWeights,
    MoeCall,
    apart_by_moe,
    matrix_shapes,
    some_apart,
)
from quant.kernels.reference import ReferenceKernels
from quant.packed import Format, PackedTensor
from tests.quant.kernels.kernel_cases import any_weight, difference

try:
    LEVELS = library.available_levels()
except library.LibraryMissingError as missing:
    pytest.skip(str(missing), allow_module_level=True)

HIDDEN, WIDTH, EXPERTS = 256, 512, 5
REFERENCE = ReferenceKernels()
MIXES: list[ExpertFormats] = [
    (Q4_K, Q4_K, Q6_K),
    (IQ4_XS, Q5_K, Q5_K),
    (Q2_K, Q2_K, Q3_K),
    (Q5_K, IQ4_NL, Q8_0),
    (MXFP4_BLOCKS, MXFP4_BLOCKS, MXFP4_BLOCKS),
    (BF16, BF16, BF16),
    (F16, F32, Q8_0),
    (Q4_K, BF16, FP8_128),
    (FP8_128, FP8_128, FP8_128),
    (NVFP4, NVFP4, INT4_HALF_GROUPS[128]),
]
mixes = pytest.mark.parametrize("formats", MIXES, ids=lambda mix: "-".join(f.name for f in mix))
levels = pytest.mark.parametrize("level", LEVELS)


def matrix(format_: Format, shape: tuple[int, int], seed: int) -> PackedTensor:
    torch.manual_seed(seed)
    if isinstance(format_, Plain):
        return format_.encode(torch.randn(shape) / shape[1] ** 0.5)
    if format_ is FP8_128 and seed % 2:
        values = torch.randn(shape) / shape[1] ** 0.5
        return FP8_128.encode(values, FP8_128.float_scales(values))
    found = any_weight(format_, *shape)
    assert isinstance(found, PackedTensor)
    return found


def experts_in(formats: ExpertFormats, hidden: int = HIDDEN, width: int = WIDTH) -> list[ExpertWeights]:
    """As files have them."""
    shapes = matrix_shapes(hidden, width)
    return [
        ExpertWeights(
            *(matrix(f, shape, 10 * n + i) for i, (f, shape) in enumerate(zip(formats, shapes, strict=True)))
        )
        for n in range(EXPERTS)
    ]


def in_slots(layout: ExpertSlotLayout | FileSlotLayout, experts: list[ExpertWeights]) -> list[ExpertWeights]:
    """In slots as large as the layout says, and a little more, as another layer's may need."""
    return [
        layout.pack_into(torch.zeros(layout.nbytes + 64, dtype=torch.uint8), *e.matrices) for e in experts
    ]


def call_of(experts: list[ExpertWeights], tokens: int, extras: ExpertExtras) -> MoeCall:
    torch.manual_seed(tokens)
    ids = torch.stack([torch.randperm(EXPERTS)[:2] for _ in range(tokens)])
    hidden = experts[0].w1.shape[1]
    return MoeCall(torch.randn(tokens, hidden) * 0.1, ids, torch.rand(tokens, 2), experts, 7.0, extras)


def only(call: MoeCall, token: int) -> MoeCall:
    part = slice(token, token + 1)
    return MoeCall(
        call.x[part], call.expert_ids[part], call.expert_weights[part], call.experts, 7.0, call.extras
    )


@levels
@mixes
def test_experts_equal_the_reference_and_need_no_company(level: str, formats: ExpertFormats) -> None:
    kernels = NativeKernels(level=level)
    files = experts_in(formats)
    layout = kernels.slot_layout(HIDDEN, WIDTH, formats)
    assert isinstance(layout, ExpertSlotLayout)
    biases = ExpertBiases(
        torch.randn(EXPERTS, WIDTH), torch.randn(EXPERTS, WIDTH), torch.randn(EXPERTS, HIDDEN)
    )
    for tokens, extras in ((1, ExpertExtras()), (11, ExpertExtras(1.702, 1.0, biases))):
        call = call_of(in_slots(layout, files), tokens, extras)
        found = kernels.moe(call)
        assert difference(found, REFERENCE.moe(call_of(files, tokens, extras))) < 2e-5
        for token in range(tokens):
            assert torch.equal(found[token : token + 1], kernels.moe(only(call, token)))
        assert torch.equal(found, NativeKernels(level=level, threads=1).moe(call))
        assert torch.equal(kernels.moe_apart(call), apart_by_moe(kernels, call))


@levels
@mixes
def test_some_choices_have_the_same_bits_as_among_all(level: str, formats: ExpertFormats) -> None:
    kernels = NativeKernels(level=level)
    layout = kernels.slot_layout(HIDDEN, WIDTH, formats)
    assert isinstance(layout, ExpertSlotLayout)
    call = call_of(in_slots(layout, experts_in(formats)), 11, ExpertExtras(1.702, 1.0))
    among_all = kernels.moe_apart(call).flatten(0, 1)
    some = torch.tensor([19, 3, 0, 20, 7, 6])
    out = torch.full_like(among_all, -1.0)

    kernels.moe_some(call, some, out)

    assert torch.equal(out[some], among_all[some])
    others = torch.ones(len(out), dtype=torch.bool)
    others[some] = False
    assert (out[others] == -1).all()
    by_gathering = torch.full_like(among_all, -1.0)
    some_apart(kernels, call, some, by_gathering)
    assert torch.equal(by_gathering, out)
    apart = torch.full((2 * len(out), out.shape[1]), -1.0)[::2]
    kernels.moe_some(call, some, apart)
    assert torch.equal(apart, out)
    kernels.moe_some(call, some, torch.empty_like(out, device="meta"))  # not written from here


@levels
@pytest.mark.parametrize("width", [31, 32, 100])
def test_plain_experts_of_any_width(level: str, width: int) -> None:
    kernels = NativeKernels(level=level)
    files = experts_in((BF16, F16, F32), 70, width)
    experts = in_slots(ExpertSlotLayout(70, width, (BF16, F16, F32)), files)
    for tokens in (1, 3):
        found = kernels.moe(call_of(experts, tokens, ExpertExtras()))
        assert difference(found, REFERENCE.moe(call_of(files, tokens, ExpertExtras()))) < 5e-6


def test_experts_that_differ_in_their_formats_are_computed_all_the_same() -> None:
    kernels = NativeKernels()
    files = [*experts_in((Q4_K, Q4_K, Q6_K))[:2], *experts_in((Q8_0, Q4_K, Q6_K))[2:]]
    call = call_of(files, 7, ExpertExtras())
    assert difference(kernels.moe(call), REFERENCE.moe(call)) < 2e-5
    assert difference(kernels.moe_apart(call), REFERENCE.moe_apart(call)) < 2e-5


@mixes
def test_slots_in_file_layout_hold_them_as_they_are(formats: ExpertFormats) -> None:
    files = experts_in(formats)
    for stored, expert in zip(in_slots(FileSlotLayout(HIDDEN, WIDTH, formats), files), files, strict=True):
        for found, expected in zip(stored.matrices, expert.matrices, strict=True):
            assert torch.equal(found.decode(), expected.decode())


@mixes
def test_matrices_are_packed_one_by_one_in_any_order(formats: ExpertFormats) -> None:
    layout = ExpertSlotLayout(HIDDEN, WIDTH, formats)
    weights = experts_in(formats)[0].matrices
    slot = torch.full((layout.nbytes,), 255, dtype=torch.uint8)
    for number in (2, 0, 1):
        layout.pack_matrix(slot, number, weights[number])
    for found, expected in zip(layout.views(slot).matrices, weights, strict=True):
        assert torch.equal(found.decode(), expected.decode())


def test_slots_take_little_more_than_files() -> None:
    def bytes_of(formats: ExpertFormats) -> int:
        shapes = matrix_shapes(HIDDEN, WIDTH)
        return sum(f.bytes_for(*shape) for f, shape in zip(formats, shapes, strict=True))

    for formats in MIXES:
        assert bytes_of(formats) <= ExpertSlotLayout(HIDDEN, WIDTH, formats).nbytes < 1.04 * bytes_of(formats)
    mxfp4 = (MXFP4, MXFP4, MXFP4)
    assert ExpertSlotLayout(HIDDEN, WIDTH, mxfp4).nbytes == bytes_of(mxfp4)


def test_a_weight_of_another_kind_is_refused() -> None:
    for layout in (ExpertSlotLayout(HIDDEN, WIDTH, Q4_K), FileSlotLayout(HIDDEN, WIDTH, Q4_K)):
        slot = torch.zeros(layout.nbytes, dtype=torch.uint8)
        with pytest.raises(
            FormatError, match=r"in q6_k of shape \[512, 256\], expected q4_k of \[512, 256\]"
        ):
            layout.pack_matrix(slot, 0, matrix(Q6_K, (WIDTH, HIDDEN), 0))
        with pytest.raises(FormatError, match=r"q4_k of shape \[512, 256\], expected q4_k of \[256, 512\]"):
            layout.pack_matrix(slot, 2, matrix(Q4_K, (WIDTH, HIDDEN), 0))


def test_formats_without_panels_lie_in_slots_in_file_layout() -> None:
    assert isinstance(NativeKernels().slot_layout(HIDDEN, WIDTH, (MXFP4, MXFP4, FP8_ROW)), FileSlotLayout)
    with pytest.raises(FormatError, match="nvfp4: there are no panels of 48 columns"):
        ExpertSlotLayout(48, 64, NVFP4)
