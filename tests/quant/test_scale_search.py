"""Searched scales are never worse than covering ones, and use what is known of the activations."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

from quant.errors import FormatError
from quant.formats.four_bit import FourBit
from quant.formats.int4 import INT4_32, INT4_128, INT4_OFFSET_32
from quant.formats.mxfp4 import MXFP4
from quant.formats.nf4 import NF4
from quant.scale_search import encode_searched
from tests.quant.strategies import matrices

FORMATS = [MXFP4, NF4, INT4_32, INT4_128, INT4_OFFSET_32]
formats = pytest.mark.parametrize("format_", FORMATS, ids=lambda f: f.name)


def block_errors(format_: FourBit, values: torch.Tensor, decoded: torch.Tensor) -> torch.Tensor:
    squares = (decoded.double() - values.double()).square()
    return squares.view(values.shape[0], -1, format_.tile_cols).sum(-1)


@formats
@settings(max_examples=30)
@given(values=matrices(rows=(1, 3), blocks=(1, 2), largest=2.0**30))
def test_no_block_gets_worse_than_with_covering_scales(format_: FourBit, values: torch.Tensor) -> None:
    plain = block_errors(format_, values, format_.encode(values).decode())
    searched = block_errors(format_, values, encode_searched(format_, values).decode())
    # Errors were compared in float32.
    assert (searched <= plain * 1.0001 + 1e-30).all()


@formats
def test_normal_weights_lose_at_least_six_percent_of_their_error(format_: FourBit) -> None:
    torch.manual_seed(0)
    values = torch.randn(128, 1024)
    plain = block_errors(format_, values, format_.encode(values).decode()).sum()
    searched = block_errors(format_, values, encode_searched(format_, values).decode()).sum()
    assert searched < 0.94 * plain


@formats
def test_importance_lowers_the_error_of_the_product(format_: FourBit) -> None:
    torch.manual_seed(0)
    weights = torch.randn(64, 512)
    x = torch.randn(256, 512) * torch.linspace(-3, 3, 512).exp()[torch.randperm(512)]
    importance = x.square().mean(0)

    def product_error(importance: torch.Tensor | None) -> torch.Tensor:
        decoded = encode_searched(format_, weights, importance).decode()
        return ((decoded - weights) @ x.T).square().sum()

    assert product_error(importance) < 0.97 * product_error(None)


@formats
def test_columns_without_importance_are_still_encoded(format_: FourBit) -> None:
    torch.manual_seed(0)
    values = torch.randn(4, 256)
    importance = torch.ones(256)
    importance[128:] = 0
    searched = encode_searched(format_, values, importance).decode()
    assert torch.equal(searched, encode_searched(format_, values).decode())


@formats
def test_rows_are_searched_alone_however_they_are_chunked(
    format_: FourBit, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    values = torch.randn(9, 256)
    at_once = encode_searched(format_, values).decode()
    monkeypatch.setattr("quant.scale_search.CHUNK_VALUES", 512)
    assert torch.equal(encode_searched(format_, values).decode(), at_once)


@pytest.mark.parametrize("importance", [torch.ones(3), torch.ones(1, 64)], ids=["too few", "two axes"])
def test_importance_of_another_shape_is_refused(importance: torch.Tensor) -> None:
    with pytest.raises(FormatError, match="one per column"):
        encode_searched(NF4, torch.zeros(2, 64), importance)


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_importance_must_be_finite_and_not_negative(bad: float) -> None:
    importance = torch.ones(64)
    importance[3] = bad
    with pytest.raises(FormatError, match="not negative"):
        encode_searched(NF4, torch.zeros(2, 64), importance)


def test_shapes_that_the_format_refuses_are_refused() -> None:
    with pytest.raises(FormatError, match="not a multiple of 64"):
        encode_searched(NF4, torch.zeros(2, 65))
    with pytest.raises(FormatError, match=r"matrices \[rows, cols\]"):
        encode_searched(NF4, torch.zeros(64))
