"""NVFP4's own promises; how files store it is tested in test_stored_matrix.py."""

from __future__ import annotations

import pytest
import torch

from quant.errors import FormatError
from quant.formats.nvfp4 import NVFP4, with_factors
from quant.packed import PackedTensor


def test_value_is_code_times_scale_of_16_columns_times_the_rows_factor() -> None:
    codes = torch.tensor([[0x21, *[0] * 7, 0xF7, *[0] * 7]], dtype=torch.uint8)
    scales = torch.tensor([[2.0, 0.5]]).to(torch.float8_e4m3fn).view(torch.uint8)
    values = PackedTensor(NVFP4, (1, 32), codes, with_factors(scales, torch.tensor(10.0))).decode()
    assert values[0, [0, 1, 2, 16, 17]].tolist() == [10.0, 20.0, 0.0, 30.0, -30.0]


def test_encoding_clips_nothing() -> None:
    torch.manual_seed(0)
    values = torch.randn(8, 64) * torch.logspace(-3, 3, 8).unsqueeze(1)
    packed = NVFP4.encode(values)
    packed.validate()
    assert packed.nbytes == NVFP4.bytes_for(8, 64)
    largest = values.view(8, 4, 16).abs().amax(-1, keepdim=True)
    error = (packed.decode() - values).view(8, 4, 16).abs()
    assert (error[3:] <= largest[3:] * 0.21).all()  # the smallest rows lie below what e4m3 scales reach


def test_rows_decode_alone() -> None:
    packed = NVFP4.encode(torch.randn(6, 64))
    assert torch.equal(packed.rows(2, 5).decode(), packed.decode()[2:5])


def test_scales_that_are_not_finite_are_refused() -> None:
    packed = NVFP4.encode(torch.randn(2, 32))
    assert packed.scales is not None
    packed.scales[1, 0] = 0x7F
    with pytest.raises(FormatError, match="a scale is NaN or infinite"):
        packed.validate()
