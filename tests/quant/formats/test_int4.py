"""INT4's own promises: bit order, negative scales, offsets."""

from __future__ import annotations

import pytest
import torch

from quant.formats.int4 import INT4_32, INT4_OFFSET_32
from quant.packed import PackedTensor


def codes_of(first: int, second: int) -> torch.Tensor:
    return torch.tensor([[first, second] + [0x88] * 14], dtype=torch.uint8)


def test_low_nibble_is_the_even_column_and_8_is_zero() -> None:
    scales = torch.tensor([[0.5]], dtype=torch.bfloat16)
    values = PackedTensor(INT4_32, (1, 32), codes_of(0x9F, 0x08), scales).decode()
    assert values[0, :5].tolist() == [3.5, 0.5, 0.0, -4.0, 0.0]


def test_offset_is_added() -> None:
    scales = torch.tensor([[[0.5, 10.0]]], dtype=torch.bfloat16)
    values = PackedTensor(INT4_OFFSET_32, (1, 32), codes_of(0x9F, 0x08), scales).decode()
    assert values[0, :5].tolist() == [13.5, 10.5, 10.0, 6.0, 10.0]


@pytest.mark.parametrize("sign", [1, -1])
def test_all_sixteen_levels_are_used_whichever_side_reaches_further(sign: int) -> None:
    values = sign * torch.cat((torch.arange(-8.0, 8.0), torch.zeros(16))).view(1, 32)
    packed = INT4_32.encode(values)
    assert torch.equal(packed.decode(), values)
    assert packed.scales is not None
    assert packed.scales.item() == sign


def test_offset_serves_values_far_from_zero() -> None:
    values = 100 + torch.linspace(0, 1, 32).view(1, 32)
    plain = (INT4_32.encode(values).decode() - values).abs().max()
    offset = (INT4_OFFSET_32.encode(values).decode() - values).abs().max()
    assert offset < 0.06
    assert plain > 0.5


def test_offset_group_of_one_value_is_exact_where_bfloat16_holds_it() -> None:
    values = torch.full((1, 32), -3.25)
    assert torch.equal(INT4_OFFSET_32.encode(values).decode(), values)


def test_codes_are_chosen_for_the_scale_as_stored() -> None:
    torch.manual_seed(0)
    values = torch.randn(8, 32) * 1.0071  # scales that bfloat16 must round
    packed = INT4_32.encode(values)
    assert packed.scales is not None
    steps = packed.scales.float().abs().expand(8, 32)
    assert ((packed.decode() - values).abs() <= steps * 0.5001).all()
