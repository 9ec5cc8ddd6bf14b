"""Which format a stored weight is in, from dtypes and config alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from quant.errors import ConfigError, FormatError
from quant.formats.fp8 import FP8_32, FP8_128, FP8_ROW
from quant.formats.int4 import INT4_32, INT4_OFFSET_64
from quant.formats.mxfp4 import MXFP4
from quant.formats.nf4 import NF4
from quant.formats.quantization_config import QuantizationConfig, Role, describe_formats
from quant.formats.stored import format_of, stored_as, unpack
from quant.packed import Format

RELEASED = {
    "quantization_config": {
        "quant_method": "fp8",
        "weight_block_size": [32, 32],
        "scale_fmt": "ue8m0",
        "expert_dtype": "fp4",
    }
}


@pytest.mark.parametrize(
    ("role", "weight", "scale", "name"),
    [
        (Role.EXPERT, "I8", "F8_E8M0", "mxfp4"),
        (Role.EXPERT, "U8", "F32", "nf4"),
        (Role.EXPERT, "U8", "BF16", "int4_32"),
        (Role.DENSE, "F8_E4M3", "F8_E8M0", "fp8_32x32"),
        (Role.DENSE, "F8_E4M3", "F32", "fp8_32x32"),
        (Role.ENGRAM, "F8_E4M3", "F8_E8M0", "fp8_row32"),
        (Role.ENGRAM, "I8", "F8_E8M0", "mxfp4"),
    ],
)
def test_dtypes_name_the_format(role: Role, weight: str, scale: str, name: str) -> None:
    format_ = format_of(role, weight, scale, QuantizationConfig.parse(RELEASED))
    assert format_ is not None
    assert format_.name == name


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_floats_without_scales_are_plain(dtype: str) -> None:
    assert format_of(Role.DENSE, dtype, None, QuantizationConfig()) is None


@pytest.mark.parametrize(
    ("weight", "scale"), [("F8_E4M3", None), ("BF16", "F32"), ("I8", None), ("F8_E5M2", "F32"), ("I8", "F16")]
)
def test_unknown_pairs_are_refused(weight: str, scale: str | None) -> None:
    with pytest.raises(FormatError, match=f"no format stores dense weights as {weight}"):
        format_of(Role.DENSE, weight, scale, QuantizationConfig())


def test_config_names_tiles_and_groups() -> None:
    raw = {"weight_block_size": [128, 128], "int4_group_size": 64, "int4_offset": True}
    config = QuantizationConfig.parse({"quantization_config": raw})
    assert config.dense is FP8_128
    assert config.int4 is INT4_OFFSET_64
    assert QuantizationConfig.parse({}) == QuantizationConfig(FP8_32, INT4_32)


@pytest.mark.parametrize(
    "raw",
    [
        {"weight_block_size": [16, 16]},
        {"weight_block_size": 32},
        {"int4_group_size": 48},
        {"int4_offset": "yes"},
        "fp8",
    ],
)
def test_settings_that_no_format_has_are_refused(raw: Any) -> None:
    with pytest.raises(ConfigError, match="quantization_config"):
        QuantizationConfig.parse({"quantization_config": raw})


@pytest.mark.parametrize(
    "format_", [MXFP4, NF4, INT4_32, INT4_OFFSET_64, FP8_32, FP8_128, FP8_ROW], ids=lambda f: f.name
)
def test_stored_bytes_come_back_as_they_were(format_: Format) -> None:
    packed = format_.encode(torch.randn(40, 128))
    assert packed.scales is not None
    weight, scale = stored_as(format_, 40, 128)
    assert weight.shape == tuple(packed.codes.shape)
    assert scale.shape == tuple(packed.scales.shape)
    raw_codes, raw_scales = packed.codes.flatten(), packed.scales.flatten().view(torch.uint8)
    back = unpack(format_, (40, 128), raw_codes, raw_scales, scale.dtypes[0])
    assert torch.equal(back.decode(), packed.decode())


def test_float_scales_of_fp8_are_read_too() -> None:
    values = torch.randn(40, 128)
    packed = FP8_128.encode(values, FP8_128.float_scales(values))
    assert packed.scales is not None
    raw = packed.codes.flatten(), packed.scales.flatten().view(torch.uint8)
    assert torch.equal(unpack(FP8_128, (40, 128), *raw, "F32").decode(), packed.decode())


def test_description_names_each_role_and_keeps_the_rest() -> None:
    source = {"model_type": "m", **RELEASED}
    formats: dict[Role, set[Format | None]] = {
        Role.EXPERT: {INT4_OFFSET_64},
        Role.DENSE: {None, FP8_32},
        Role.ENGRAM: {MXFP4},
    }
    described = describe_formats(source, formats)
    assert described["model_type"] == "m"
    assert described["quantization_config"] == {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [32, 32],
        "scale_fmt": "ue8m0",
        "expert_dtype": "int4",
        "int4_group_size": 64,
        "int4_offset": True,
        "dense_dtype": "fp8",
        "engram_dtype": "fp4",
    }
    assert QuantizationConfig.parse(described) == QuantizationConfig(
        FP8_32, INT4_OFFSET_64, "fp8", is_exact_in_bfloat16=True
    )


def test_groups_of_formats_that_are_gone_are_not_described() -> None:
    source = {"quantization_config": {"int4_group_size": 64, "int4_offset": True}}
    formats: dict[Role, set[Format | None]] = {Role.EXPERT: {NF4}, Role.DENSE: {None}, Role.ENGRAM: set()}
    described = describe_formats(source, formats)["quantization_config"]
    assert described["expert_dtype"] == "nf4"
    assert described["dense_dtype"] == "bf16"
    assert not {"int4_group_size", "int4_offset", "engram_dtype"} & described.keys()


def test_plain_model_has_no_quantization_config() -> None:
    formats: dict[Role, set[Format | None]] = {role: {None} for role in Role}
    assert describe_formats({"model_type": "m", **RELEASED}, formats) == {"model_type": "m"}
