"""Experts on their way to a GPU and back: the very bytes, whatever the dimensions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quant.errors import FormatError
from quant.formats.gguf_k import Q4_K, Q6_K
from quant.formats.gguf_levels import MXFP4_BLOCKS
from quant.formats.int4 import INT4_32, INT4_64, INT4_OFFSET_32
from quant.formats.mxfp4 import MXFP4
from quant.formats.nf4 import NF4
from quant.kernels.cpu.panel_slots import ExpertSlotLayout
from quant.kernels.cuda.slots import GpuSlotLayout
from quant.kernels.file_slots import FileSlotLayout
from quant.packed import Format
from tests.quant.kernels.kernel_cases import expert, gguf_weight


@pytest.mark.slow
@pytest.mark.parametrize("format_", [MXFP4, NF4, INT4_32, INT4_64], ids=lambda f: f.name)
@given(hidden=st.integers(1, 6), width=st.integers(1, 6))
def test_a_slot_on_a_gpu_holds_what_the_file_has_and_gives_the_panels_back(
    format_: Format, hidden: int, width: int
) -> None:
    hidden, width = 64 * hidden, 64 * width
    weights = expert(format_, hidden, width, seed=hidden + width)
    panels, gpu = ExpertSlotLayout(hidden, width, format_), GpuSlotLayout(hidden, width, format_)
    source, back = torch.zeros(2, panels.nbytes, dtype=torch.uint8)
    slot = torch.zeros(gpu.nbytes, dtype=torch.uint8)
    panels.pack_into(source, *weights.matrices)
    gpu.from_panels(slot, source)
    expected = torch.zeros(gpu.nbytes, dtype=torch.uint8)
    FileSlotLayout(hidden, width, format_).pack_into(expected, *weights.matrices)
    assert torch.equal(slot, expected)
    gpu.to_panels(slot, back)
    assert torch.equal(back, source)


def test_rows_that_do_not_fill_their_last_panel() -> None:
    weights = expert(MXFP4, 96, 32, seed=1)
    panels, gpu = ExpertSlotLayout(96, 32), GpuSlotLayout(96, 32)
    source, slot = torch.zeros(panels.nbytes, dtype=torch.uint8), torch.zeros(gpu.nbytes, dtype=torch.uint8)
    panels.pack_into(source, *weights.matrices)
    gpu.from_panels(slot, source)
    for found, wanted in zip(gpu.views(slot).matrices, weights.matrices, strict=True):
        assert torch.equal(found.codes, wanted.codes)
        assert found.scales is not None
        assert wanted.scales is not None
        assert torch.equal(found.scales, wanted.scales)


def test_mxfp4_of_gguf_is_mxfp4_on_a_gpu() -> None:
    weights = [gguf_weight(MXFP4_BLOCKS, *shape) for shape in ((64, 96), (64, 96), (96, 64))]
    panels, gpu = ExpertSlotLayout(96, 64, MXFP4_BLOCKS), GpuSlotLayout(96, 64, MXFP4_BLOCKS)
    source, slot = torch.zeros(panels.nbytes, dtype=torch.uint8), torch.zeros(gpu.nbytes, dtype=torch.uint8)
    w1, w3, w2 = weights
    panels.pack_into(source, w1, w3, w2)
    gpu.from_panels(slot, source)
    for found, wanted in zip(gpu.views(slot).matrices, weights, strict=True):
        assert found.format is MXFP4
        assert torch.equal(found.decode(), wanted.decode())


def test_formats_that_cannot_lie_on_a_gpu_are_refused() -> None:
    with pytest.raises(FormatError, match="cannot be placed on a GPU yet"):
        GpuSlotLayout(64, 64, INT4_OFFSET_32)
    with pytest.raises(FormatError, match="q4_k, q6_k: experts in this format cannot be placed on a GPU yet"):
        GpuSlotLayout(256, 256, (Q4_K, Q4_K, Q6_K))
