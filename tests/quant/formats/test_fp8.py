"""FP8 tiles: bits, tiles that the matrix cuts, both kinds of scales."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quant.errors import FormatError
from quant.formats.fp8 import FP8_32, FP8_128, FP8_ROW, Fp8
from quant.packed import PackedTensor
from tests.quant.strategies import matrices

formats = pytest.mark.parametrize("format_", [FP8_32, FP8_128, FP8_ROW], ids=lambda f: f.name)


@pytest.mark.parametrize(
    ("code", "value"),
    [(0x00, 0.0), (0x01, 2.0**-9), (0x08, 2.0**-6), (0x38, 1.0), (0x7E, 448.0), (0xFE, -448.0), (0xB8, -1.0)],
)
def test_codes_are_e4m3(code: int, value: float) -> None:
    codes = torch.tensor([[code]], dtype=torch.uint8)
    packed = PackedTensor(FP8_32, (1, 1), codes, torch.tensor([[127]], dtype=torch.uint8))
    assert packed.decode().item() == value


@formats
def test_each_tile_has_its_own_scale(format_: Fp8) -> None:
    rows, cols = 2 * format_.tile_rows, 2 * format_.tile_cols
    scales = torch.tensor([[127, 128], [129, 130]], dtype=torch.uint8)
    packed = PackedTensor(format_, (rows, cols), torch.full((rows, cols), 0x38, dtype=torch.uint8), scales)
    values = packed.decode()
    corners = values[:: rows - 1, :: cols - 1]
    assert corners.tolist() == [[1, 2], [4, 8]]
    assert values[format_.tile_rows - 1, format_.tile_cols].item() == 2


@formats
@given(seed=st.integers(0, 10_000), exponent=st.integers(-100, 100), rows=st.integers(1, 40))
def test_what_powers_of_two_can_represent_survives_encoding(
    format_: Fp8, seed: int, exponent: int, rows: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (rows, 70), dtype=torch.uint8, generator=generator)
    codes[codes & 0x7F == 0x7F] = 0
    scales = torch.full(format_.scale_shape(rows, 70), exponent + 127, dtype=torch.uint8)
    values = PackedTensor(format_, (rows, 70), codes, scales).decode()
    assert torch.equal(format_.encode(values).decode(), values)


def check_error(format_: Fp8, values: torch.Tensor, packed: PackedTensor) -> None:
    """Within half a unit of e4m3: 1/16 of the value, or of the smallest step where that is larger."""
    largest = values.abs().amax()
    bound = torch.maximum(values.abs() / 16 * 1.0001, largest / 224 * 2.0**-10).clamp(min=2.0**-136)
    assert ((packed.decode() - values).abs() <= bound).all()


@pytest.mark.slow
@formats
@given(values=matrices(rows=(1, 40), blocks=(1, 2), block=50))
def test_error_is_at_most_half_a_step(format_: Fp8, values: torch.Tensor) -> None:
    check_error(format_, values, format_.encode(values))
    check_error(format_, values, format_.encode(values, format_.float_scales(values)))


@formats
@given(values=matrices(rows=(1, 3), blocks=(1, 1), largest=torch.finfo(torch.float32).max))
def test_any_finite_matrix_encodes_to_finite_values(format_: Fp8, values: torch.Tensor) -> None:
    for scales in None, format_.float_scales(values):
        packed = format_.encode(values, scales)
        packed.validate()
        assert packed.decode().isfinite().all()


def test_float_scales_map_the_largest_value_to_448() -> None:
    values = torch.tensor([[1.0, -7.0, 3.0]])
    scales = FP8_128.float_scales(values)
    assert scales.tolist() == [[pytest.approx(7 / 448)]]
    assert FP8_128.encode(values, scales).decode()[0, 1].item() == pytest.approx(-7)


def test_subnormal_float_scales_are_decoded_exactly() -> None:
    scales = torch.tensor([[1e-40]])
    packed = PackedTensor(FP8_128, (1, 1), torch.tensor([[0x38]], dtype=torch.uint8), scales)
    assert packed.decode().item() == scales.item()


@formats
def test_zeros_stay_zero(format_: Fp8) -> None:
    values = torch.zeros(33, 65)
    assert torch.equal(format_.encode(values).decode(), values)
    assert torch.equal(format_.encode(values, format_.float_scales(values)).decode(), values)


@formats
def test_rows_on_tile_borders_decode_alone(format_: Fp8) -> None:
    packed = format_.encode(torch.randn(2 * format_.tile_rows + 3, 64))
    start = format_.tile_rows
    assert torch.equal(packed.rows(start, packed.shape[0]).decode(), packed.decode()[start:])


def test_rows_that_cut_a_tile_are_refused() -> None:
    packed = FP8_32.encode(torch.randn(64, 64))
    with pytest.raises(FormatError, match="cut through a tile of 32 rows"):
        packed.rows(16, 48)


@formats
def test_bytes_for_is_what_encoding_takes(format_: Fp8) -> None:
    assert format_.encode(torch.randn(33, 200)).nbytes == format_.bytes_for(33, 200)


def test_nan_scale_is_refused() -> None:
    packed = FP8_32.encode(torch.randn(32, 32))
    assert packed.scales is not None
    packed.scales[0, 0] = 255
    with pytest.raises(FormatError, match="255"):
        packed.validate()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_float_scale_is_refused(bad: float) -> None:
    packed = FP8_128.encode(torch.randn(4, 4), torch.tensor([[0.01]]))
    assert packed.scales is not None
    packed.scales[0, 0] = bad
    with pytest.raises(FormatError, match="NaN or infinite"):
        packed.validate()


def test_nan_code_is_refused() -> None:
    packed = FP8_32.encode(torch.randn(40, 40))
    packed.codes[39, 7] = 0x7F
    with pytest.raises(FormatError, match=r"rows 0\.\.40 decode to NaN"):
        packed.validate()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_values_are_refused(bad: float) -> None:
    with pytest.raises(FormatError, match="NaN or infinite"):
        FP8_32.encode(torch.tensor([[1.0, bad]]))


def test_wrong_shapes_and_dtypes_are_refused() -> None:
    good = FP8_32.encode(torch.randn(64, 64))
    assert good.scales is not None
    with pytest.raises(FormatError, match=r"scales shape is \(1, 2\), expected \(2, 2\)"):
        PackedTensor(FP8_32, (64, 64), good.codes, good.scales[:1])
    with pytest.raises(FormatError, match="codes dtype"):
        PackedTensor(FP8_32, (64, 64), good.codes.view(torch.float8_e4m3fn), good.scales)
    with pytest.raises(FormatError, match="scales dtype"):
        PackedTensor(FP8_32, (64, 64), good.codes, good.scales.half())
    with pytest.raises(FormatError, match="scales are missing"):
        PackedTensor(FP8_32, (64, 64), good.codes)
