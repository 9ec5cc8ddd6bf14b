"""What MXFP4, NF4 and INT4 promise alike."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quant.errors import FormatError
from quant.formats.four_bit import FourBit
from quant.formats.int4 import INT4_32, INT4_64, INT4_128, INT4_OFFSET_32, INT4_OFFSET_64, INT4_OFFSET_128
from quant.formats.mxfp4 import MXFP4
from quant.formats.nf4 import NF4
from quant.packed import PackedTensor
from tests.quant.strategies import matrices

FORMATS = [
    MXFP4, NF4, INT4_32, INT4_64, INT4_128, INT4_OFFSET_32, INT4_OFFSET_64, INT4_OFFSET_128,
]  # fmt: skip
SYMMETRIC = [MXFP4, NF4, INT4_32, INT4_64, INT4_128]
formats = pytest.mark.parametrize("format_", FORMATS, ids=lambda f: f.name)
symmetric = pytest.mark.parametrize("format_", SYMMETRIC, ids=lambda f: f.name)

# Half the widest gap between levels, as a share of the block's largest magnitude.
WORST_ERROR = {"mxfp4": 1 / 3, "nf4": 0.153}


def random_codes(format_: FourBit, rows: int, blocks: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, blocks * format_.tile_cols // 2)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


@symmetric
@given(seed=st.integers(0, 10_000), exponent=st.integers(-100, 100))
def test_what_a_format_can_represent_survives_encoding(format_: FourBit, seed: int, exponent: int) -> None:
    codes = random_codes(format_, 3, 2, seed)
    # The largest magnitude occurs in every block, so that its scale can be found again.
    codes[:, 0 :: format_.tile_cols // 2] = {"mxfp4": 0x77, "nf4": 0xFF}.get(format_.name, 0x00)
    scales = format_.store(torch.full((3, 2), 2.0**exponent))
    values = PackedTensor(format_, (3, 2 * format_.tile_cols), codes, scales).decode()
    assert torch.equal(format_.encode(values).decode(), values)


@pytest.mark.slow
@formats
@given(values=matrices(rows=(1, 4), blocks=(1, 3)))
def test_error_is_at_most_half_a_step(format_: FourBit, values: torch.Tensor) -> None:
    values = values[:, : values.shape[1] // format_.tile_cols * format_.tile_cols]
    decoded = format_.encode(values).decode()
    blocks = values.view(values.shape[0], -1, format_.tile_cols)
    error = (decoded - values).view_as(blocks).abs().amax(-1)
    largest = blocks.abs().amax(-1)
    if format_.scale_fields:
        step = format_.scale_values(format_.covering_scales(blocks))
        bound = step * 0.5001 + largest * 1e-6
    else:
        bound = largest * WORST_ERROR.get(format_.name, 0.0724) + 2.0**-126
    assert (error <= bound).all()


@pytest.mark.slow
@formats
@given(values=matrices(rows=(1, 2), blocks=(1, 1), largest=torch.finfo(torch.float32).max))
def test_any_finite_matrix_encodes_to_finite_values(format_: FourBit, values: torch.Tensor) -> None:
    packed = format_.encode(values)
    packed.validate()
    assert packed.decode().isfinite().all()


@formats
def test_encoding_what_was_decoded_changes_nothing(format_: FourBit) -> None:
    torch.manual_seed(0)
    once = format_.encode(torch.randn(4, 256))
    again = format_.encode(once.decode(), once.scales)
    assert torch.equal(again.decode(), once.decode())


@formats
def test_blocks_of_zeros_stay_zero(format_: FourBit) -> None:
    assert torch.equal(format_.encode(torch.zeros(2, 128)).decode().abs(), torch.zeros(2, 128))


@formats
def test_outlier_spoils_only_its_own_block(format_: FourBit) -> None:
    torch.manual_seed(0)
    values = torch.randn(1, 256)
    spoiled = values.clone()
    spoiled[0, 5] = 1e6
    before, after = format_.encode(values).decode(), format_.encode(spoiled).decode()
    assert torch.equal(before[:, format_.tile_cols :], after[:, format_.tile_cols :])
    assert after[0, 5] == pytest.approx(1e6, rel=0.2)


@formats
def test_subnormal_values_encode_without_dividing_by_zero(format_: FourBit) -> None:
    values = torch.linspace(-1e-42, 1e-42, 128).view(1, 128)
    decoded = format_.encode(values).decode()
    assert decoded.isfinite().all()
    assert (decoded - values).abs().max() <= 2.0**-126


@formats
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_values_are_refused(format_: FourBit, bad: float) -> None:
    values = torch.zeros(2, 128)
    values[1, 3] = bad
    with pytest.raises(FormatError, match="NaN or infinite"):
        format_.encode(values)


@formats
@pytest.mark.parametrize("cols", [0, 1, 16, 100, 129])
def test_ragged_columns_are_refused(format_: FourBit, cols: int) -> None:
    with pytest.raises(FormatError, match=r"not a multiple|matrices \[rows, cols\]"):
        format_.encode(torch.zeros(2, cols))


@formats
def test_integers_and_vectors_are_refused(format_: FourBit) -> None:
    with pytest.raises(FormatError, match="encodes floats"):
        format_.encode(torch.zeros(2, 128, dtype=torch.int32))
    with pytest.raises(FormatError, match=r"matrices \[rows, cols\]"):
        format_.encode(torch.zeros(128))


@formats
def test_bytes_for_is_what_encoding_takes(format_: FourBit) -> None:
    assert format_.encode(torch.randn(6, 384)).nbytes == format_.bytes_for(6, 384)


@formats
def test_rows_are_views_that_decode_alone(format_: FourBit) -> None:
    packed = format_.encode(torch.randn(6, 128))
    part = packed.rows(2, 5)
    assert torch.equal(part.decode(), packed.decode()[2:5])
    assert part.codes.data_ptr() == packed.codes[2:].data_ptr()


@formats
def test_wrong_shapes_and_dtypes_are_refused(format_: FourBit) -> None:
    good = format_.encode(torch.randn(4, 256))
    assert good.scales is not None
    with pytest.raises(FormatError, match="codes shape"):
        PackedTensor(format_, (4, 256), good.codes[:, 1:], good.scales)
    with pytest.raises(FormatError, match="codes dtype"):
        PackedTensor(format_, (4, 256), good.codes.view(torch.int8), good.scales)
    with pytest.raises(FormatError, match="scales shape"):
        PackedTensor(format_, (4, 256), good.codes, good.scales[:3])
    with pytest.raises(FormatError, match="scales dtype"):
        PackedTensor(format_, (4, 256), good.codes, good.scales.double())
    with pytest.raises(FormatError, match="scales are missing"):
        PackedTensor(format_, (4, 256), good.codes)


@pytest.mark.parametrize("format_", [f for f in FORMATS if f is not MXFP4], ids=lambda f: f.name)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_scales_are_refused(format_: FourBit, bad: float) -> None:
    packed = format_.encode(torch.randn(4, 256))
    assert packed.scales is not None
    packed.scales.view(-1)[3] = bad
    with pytest.raises(FormatError, match="NaN or infinite"):
        packed.validate()
