"""Plain floats as packed tensors."""

from __future__ import annotations

import pytest
import torch

from quant.errors import FormatError
from quant.formats.plain import BF16, F32, PLAIN, as_packed
from quant.packed import PackedTensor


@pytest.mark.parametrize("dtype", PLAIN)
def test_bytes_are_the_values(dtype: torch.dtype) -> None:
    values = torch.randn(5, 12).to(dtype)
    packed = as_packed(values)
    assert torch.equal(packed.decode(), values.float())
    assert torch.equal(packed.rows(1, 3).decode(), values[1:3].float())
    assert packed.nbytes == packed.format.bytes_for(5, 12) == values.nbytes
    assert packed.codes.data_ptr() == values.data_ptr()


def test_values_at_odd_bytes_are_read_too() -> None:
    codes = torch.cat((torch.zeros(1, dtype=torch.uint8), torch.ones(6).view(torch.uint8)))[1:].view(2, 12)
    assert torch.equal(PackedTensor(F32, (2, 3), codes).decode(), torch.ones(2, 3))


def test_scales_and_wrong_shapes_are_refused() -> None:
    values = torch.ones(2, 4)
    with pytest.raises(FormatError, match="bf16: codes shape"):
        PackedTensor(BF16, (2, 4), values.view(torch.uint8))
    with pytest.raises(FormatError, match="plain values have no scales"):
        BF16.encode(values, torch.ones(2))
