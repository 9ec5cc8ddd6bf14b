"""ue8m0: every code is a power of two, and the scale chosen for a block just covers it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quant.errors import FormatError
from quant.formats.ue8m0 import covering_scale, decode_ue8m0, inverse_ue8m0, largest_code, refuse_nan


def test_every_code_is_a_power_of_two() -> None:
    codes = torch.arange(255, dtype=torch.uint8)
    assert decode_ue8m0(codes).tolist() == [math.ldexp(1, c - 127) for c in range(255)]


def test_inverse_undoes_the_scale_exactly() -> None:
    codes = torch.arange(254, dtype=torch.uint8)
    assert (decode_ue8m0(codes) * inverse_ue8m0(codes) == 1).all()


def test_nan_code_is_refused_with_the_tensor_named() -> None:
    refuse_nan(torch.tensor([0, 254], dtype=torch.uint8), "w.scale")
    with pytest.raises(FormatError, match=r"w\.scale.*255"):
        refuse_nan(torch.tensor([0, 255], dtype=torch.uint8), "w.scale")


@given(
    largest=st.floats(0, torch.finfo(torch.float32).max, width=32), limit=st.sampled_from([6.0, 448.0, 1.0])
)
def test_covering_scale_is_the_smallest_that_covers(largest: float, limit: float) -> None:
    code = int(covering_scale(torch.tensor([largest]), limit).item())
    covers = largest <= math.ldexp(limit, code - 127)
    assert covers or code == largest_code(limit)
    if largest > 0 and code > 0:
        assert largest > math.ldexp(limit, code - 1 - 127)


@pytest.mark.parametrize("limit", [6.0, 448.0])
def test_largest_code_is_the_last_that_stays_finite(limit: float) -> None:
    code = largest_code(limit)
    assert math.ldexp(limit, code - 127) <= torch.finfo(torch.float32).max < math.ldexp(limit, code - 126)
