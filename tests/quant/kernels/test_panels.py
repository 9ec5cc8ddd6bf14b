"""Panels hold every bit of a weight in file layout, in as many bytes as they say."""

from __future__ import annotations

import pytest
import torch

from quant.errors import FormatError
from quant.formats.gguf_k import Q4_K
from quant.formats.nvfp4 import NVFP4
from quant.kernels.cpu import library
from quant.kernels.cpu.panels import PANEL_ROWS, TILED, tile, tiled_format, untile
from quant.packed import Format, PackedTensor
from tests.quant.kernels.kernel_cases import GGUF, NATIVE, any_weight, name_of, weight

try:
    library.load()
except library.LibraryMissingError as missing:
    pytest.skip(str(missing), allow_module_level=True)

formats = pytest.mark.parametrize("format_", [*NATIVE, *GGUF], ids=name_of)


def packed(format_: Format, rows: int) -> PackedTensor:
    """With a last strip that is shorter, where there are such."""
    w = any_weight(format_, rows, 256 + (160 if format_.tile_cols <= 32 else format_.tile_cols))
    assert isinstance(w, PackedTensor)
    return w


@formats
@pytest.mark.parametrize("rows", [1, 70])
def test_panels_come_back_as_they_were(format_: Format, rows: int) -> None:
    w = packed(format_, rows)
    back = untile(tile(w))
    assert torch.equal(back.codes, w.codes)
    assert back.shape == w.shape
    if w.scales is not None:
        assert back.scales is not None
        assert torch.equal(back.scales, w.scales)


@formats
def test_single_rows_are_taken_out_of_panels(format_: Format) -> None:
    if format_.tile_rows > 1:
        pytest.skip("rows share their scales")
    w, rows = packed(format_, 70), torch.tensor([69, 0, 31, 32])
    assert torch.equal(untile(tile(w), rows).decode(), w.decode()[rows])


@formats
def test_bytes_of_panels_are_those_that_the_library_writes(format_: Format) -> None:
    w = packed(format_, 33)
    form = TILED[format_.name]
    each = library.load().loci_panel_bytes(tile(w).address)
    assert (form.bytes_for(33, w.shape[1]), PANEL_ROWS * form.row_bytes(w.shape[1])) == (2 * each, each)


def test_columns_that_end_within_a_block_have_no_panels() -> None:
    half_a_block = weight(NVFP4, 4, 48)
    assert tiled_format(half_a_block) is None
    with pytest.raises(FormatError, match="nvfp4: there is no panel layout"):
        tile(half_a_block)
    assert tiled_format(any_weight(Q4_K, 4, 256)) is TILED["q4_k"]  # type: ignore[arg-type]
