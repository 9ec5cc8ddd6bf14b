"""The GGUF formats against the `gguf` package's own dequantisation."""

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from quant.errors import FormatError
from quant.formats.gguf import FORMATS, PLAIN_DTYPES, weight_from_bytes
from quant.packed import PackedTensor

TYPES = sorted(FORMATS)


def block_bytes(name: str, rows: int, blocks: int) -> st.SearchStrategy[np.ndarray]:
    return arrays(np.uint8, (rows, blocks * FORMATS[name].block_bytes))


def packed_of(name: str, codes: np.ndarray) -> PackedTensor:
    cols = codes.shape[1] // FORMATS[name].block_bytes * FORMATS[name].tile_cols
    return PackedTensor(FORMATS[name], (len(codes), cols), torch.from_numpy(codes))


@pytest.mark.slow
@pytest.mark.parametrize("name", TYPES)
@settings(max_examples=40)
@given(data=st.data(), rows=st.integers(1, 3), blocks=st.integers(1, 3))
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_any_bytes_decode_as_in_the_gguf_package(
    name: str, data: st.DataObject, rows: int, blocks: int
) -> None:
    codes = data.draw(block_bytes(name, rows, blocks))
    if name == "MXFP4":  # 255 is NaN to us, and to the standard; to the package a large number
        codes[:, ::17] = codes[:, ::17].clip(max=254)

    ours = packed_of(name, codes).decode().numpy()

    theirs = gguf.quants.dequantize(codes, gguf.GGMLQuantizationType[name])
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_random_bytes_decode_as_in_the_gguf_package(name: str) -> None:
    codes = np.random.default_rng(7).integers(0, 255, (16, 3 * FORMATS[name].block_bytes), dtype=np.uint8)

    theirs = gguf.quants.dequantize(codes, gguf.GGMLQuantizationType[name])

    np.testing.assert_array_equal(packed_of(name, codes).decode().numpy(), theirs)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_what_the_gguf_package_quantised_comes_back_within_half_a_step(name: str) -> None:
    values = np.random.default_rng(0).normal(size=(8, 256)).astype(np.float32)
    codes = gguf.quants.quantize(values, gguf.GGMLQuantizationType[name])

    decoded = packed_of(name, codes).decode().numpy()

    groups = values.reshape(8, 8, 32)
    span = np.ptp(groups, axis=-1) if name.endswith("_1") else np.abs(groups).max(-1)
    step = span / {"Q4_0": 8, "Q4_1": 15, "Q5_0": 16, "Q5_1": 31, "Q8_0": 127}[name]
    worst = 1.0 if name in ("Q4_0", "Q5_0") else 0.51  # these have no code for the far end of one side
    assert (np.abs(decoded.reshape(8, 8, 32) - groups).max(-1) <= worst * step + 2e-3).all()


@pytest.mark.parametrize("name", TYPES)
def test_a_slice_of_rows_is_a_view_that_decodes_to_those_rows(name: str) -> None:
    codes = np.random.default_rng(1).integers(0, 60, (5, 2 * FORMATS[name].block_bytes), dtype=np.uint8)
    packed = packed_of(name, codes)

    part = packed.rows(1, 4)

    assert part.codes.data_ptr() == packed.codes[1].data_ptr()
    assert torch.equal(part.decode(), packed.decode()[1:4])


@pytest.mark.parametrize("name", TYPES)
def test_bytes_for_is_what_the_tensor_weighs(name: str) -> None:
    packed = packed_of(name, np.zeros((3, 4 * FORMATS[name].block_bytes), dtype=np.uint8))

    assert packed.nbytes == FORMATS[name].bytes_for(*packed.shape)


@pytest.mark.parametrize("name", TYPES)
@given(extra=st.integers(1, 31), rows=st.integers(1, 40))
def test_columns_that_cut_a_block_are_refused(name: str, extra: int, rows: int) -> None:
    format_ = FORMATS[name]
    cols = format_.tile_cols + extra
    data = torch.zeros(rows * format_.bytes_for(1, cols), dtype=torch.uint8)

    with pytest.raises(FormatError, match=f"{format_.name}: columns modulo {format_.tile_cols} is {extra}"):
        weight_from_bytes(name, (rows, cols), data)


@pytest.mark.parametrize("name", [*TYPES, *PLAIN_DTYPES])
def test_bytes_that_do_not_fit_the_shape_are_refused(name: str) -> None:
    with pytest.raises(FormatError, match="bytes"):
        weight_from_bytes(name, (2, 256), torch.zeros(100, dtype=torch.uint8))


def test_packed_types_need_a_matrix() -> None:
    with pytest.raises(FormatError, match=r"Q8_0: shape \[32\], expected a matrix"):
        weight_from_bytes("Q8_0", (32,), torch.zeros(34, dtype=torch.uint8))


def test_a_type_that_is_not_read_is_named_with_those_that_are() -> None:
    with pytest.raises(FormatError, match=r"IQ2_XS is not supported; known: Q4_0, .*, IQ4_XS, MXFP4, F32"):
        weight_from_bytes("IQ2_XS", (1, 256), torch.zeros(74, dtype=torch.uint8))


def test_scales_beside_interleaved_codes_are_refused() -> None:
    with pytest.raises(FormatError, match="scales beside the codes"):
        PackedTensor(FORMATS["Q8_0"], (1, 32), torch.zeros(1, 34, dtype=torch.uint8), torch.zeros(1))


@pytest.mark.parametrize(("name", "dtype"), PLAIN_DTYPES.items())
def test_plain_tensors_are_views_of_their_bytes(name: str, dtype: torch.dtype) -> None:
    values = torch.arange(12, dtype=dtype).view(3, 4)
    data = values.view(torch.uint8).flatten()

    weight = weight_from_bytes(name, (3, 4), data)

    assert isinstance(weight, torch.Tensor)
    assert torch.equal(weight, values)
    assert weight.data_ptr() == data.data_ptr()


def test_plain_tensors_at_an_odd_offset_are_copied() -> None:
    values = torch.arange(6, dtype=torch.float32)
    shifted = torch.cat((torch.zeros(1, dtype=torch.uint8), values.view(torch.uint8)))[1:]

    weight = weight_from_bytes("F32", (6,), shifted)

    assert isinstance(weight, torch.Tensor)
    assert torch.equal(weight, values)
