"""MXFP4's own promises: bit order, rounding, power-of-two scales."""

from __future__ import annotations

import pytest
import torch

from quant.errors import FormatError
from quant.formats.mxfp4 import E2M1, MXFP4
from quant.packed import PackedTensor


def packed_row(codes: list[int], scale: int) -> PackedTensor:
    padded = codes + [0] * (16 - len(codes))
    return PackedTensor(
        MXFP4,
        (1, 32),
        torch.tensor([padded], dtype=torch.uint8),
        torch.tensor([[scale]], dtype=torch.uint8),
    )


def test_low_nibble_is_the_even_column() -> None:
    values = packed_row([0x21, 0xF7], 127).decode()
    assert values[0, :4].tolist() == [0.5, 1.0, 6.0, -6.0]


def test_every_code_is_an_e2m1_value() -> None:
    row = packed_row([2 * i | (2 * i + 1) << 4 for i in range(8)], 127).decode()[0, :16]
    expected = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
    assert row.tolist() == expected


@pytest.mark.parametrize(("code", "scale"), [(0, 2.0**-127), (1, 2.0**-126), (127, 1.0), (252, 2.0**125)])
def test_scale_is_a_power_of_two(code: int, scale: float) -> None:
    assert packed_row([0x07], code).decode()[0, 0].item() == 6 * scale


def test_nan_scale_is_refused() -> None:
    with pytest.raises(FormatError, match="255"):
        packed_row([0x07], 255).validate()


def test_scale_that_overflows_float32_is_refused_only_where_it_does() -> None:
    packed_row([0x01], 254).validate()
    with pytest.raises(FormatError, match="NaN or infinite"):
        packed_row([0x07], 254).validate()


def test_ties_round_to_the_even_code() -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.25, -0.75, -1.25, -5.0])
    rounded = MXFP4.nearest_levels(ties)
    assert rounded.tolist() == [0, 1, 1, 2, 2, 4, 4, 0, -1, -1, -4]


def test_every_value_goes_to_its_nearest_level() -> None:
    values = torch.linspace(-7, 7, 20_001)
    distance = (values.clamp(-6, 6).unsqueeze(1) - E2M1).abs()
    chosen = (values.clamp(-6, 6) - MXFP4.nearest_levels(values)).abs()
    assert torch.equal(chosen, distance.amin(1))


@pytest.mark.parametrize(("largest", "code"), [(6.0, 127), (6.001, 128), (3.0, 126), (3.001, 127)])
def test_scale_is_the_smallest_that_clips_nothing(largest: float, code: int) -> None:
    values = torch.zeros(1, 32)
    values[0, 7] = -largest
    scales = MXFP4.encode(values).scales
    assert scales is not None
    assert scales.item() == code


def test_codes_follow_scales_that_are_given() -> None:
    scales = torch.tensor([[125]], dtype=torch.uint8)
    decoded = MXFP4.encode(torch.full((1, 32), 3.0), scales).decode()
    assert decoded.unique().tolist() == [1.5]
