"""Matrices as released checkpoints store them, against plain numpy readings of each layout's description."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from quant.errors import ConfigError, FormatError
from quant.formats.fp8 import FP8_128
from quant.formats.gguf_k import Q4_K
from quant.formats.plain import BF16
from quant.formats.quantization_config import QuantizationConfig
from quant.formats.stored_matrix import StoredMatrix, every_other_row, find_matrix, from_mxfp4_blocks
from quant.packed import PackedTensor

Array = npt.NDArray[Any]
RNG = np.random.default_rng(0)
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=np.float32)
DTYPES = {torch.float8_e4m3fn: "F8_E4M3", torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32",
          torch.int32: "I32", torch.uint8: "U8", torch.int64: "I64"}  # fmt: skip


@dataclass(frozen=True)
class Header:
    dtype: str
    shape: tuple[int, ...]


def find(tensors: dict[str, torch.Tensor], shape: tuple[int, int], config: dict[str, Any]) -> StoredMatrix:
    headers = {name: Header(DTYPES[t.dtype], tuple(t.shape)) for name, t in tensors.items()}
    return find_matrix("m", shape, headers, QuantizationConfig.parse({"quantization_config": config}))


def read(matrix: StoredMatrix, tensors: dict[str, torch.Tensor]) -> Array:
    for ending, expected in matrix.tensors.items():
        tensor = tensors[f"m{ending}"]
        assert (DTYPES[tensor.dtype] in expected.dtypes, tuple(tensor.shape)) == (True, expected.shape)
    raw = {name: tensors[name].contiguous().flatten().view(torch.uint8) for name in matrix.needed}
    weight = matrix.weight(raw)
    assert isinstance(weight, PackedTensor)
    assert weight.format is matrix.format
    weight.validate()
    decoded: Array = weight.decode().numpy()
    return decoded


def words(nibbles: Array) -> torch.Tensor:
    """Codes `[..., 8 n]` as int32 `[..., n]`, the first in the lowest bits."""
    eight = nibbles.reshape(*nibbles.shape[:-1], -1, 8).astype(np.uint32)
    packed = np.bitwise_or.reduce(eight << (4 * np.arange(8, dtype=np.uint32)), axis=-1)
    return torch.from_numpy(packed.astype(np.uint32).view(np.int32))


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}


def gptq(sym: bool, less_one: int, rows: int = 16, cols: int = 128, group: int = 64) -> tuple[Any, Array]:
    codes = RNG.integers(0, 16, (rows, cols))
    zeros = np.full((rows, cols // group), 8) if sym else RNG.integers(1, 16, (rows, cols // group))
    scales = RNG.normal(size=(rows, cols // group)).astype(np.float16)
    expected = (codes - zeros.repeat(group, 1)) * scales.astype(np.float32).repeat(group, 1)
    tensors = {
        "m.qweight": words(codes.reshape(rows, cols // 8, 8)).squeeze(-1).T,
        "m.qzeros": words((zeros - less_one).T),
        "m.scales": torch.from_numpy(scales.T.copy()),
        "m.g_idx": torch.arange(cols, dtype=torch.int32) // group,
    }
    return tensors, expected


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize(("version", "less_one"), [("gptq", 1), ("gptq_v2", 0)])
def test_gptq_is_read_without_rounding(sym: bool, version: str, less_one: int) -> None:
    tensors, expected = gptq(sym, less_one)
    matrix = find(tensors, (16, 128), {**GPTQ, "sym": sym, "checkpoint_format": version})
    assert matrix.format.name == ("int4_f16_64" if sym else "int4_offset_f32_64")
    np.testing.assert_allclose(read(matrix, tensors), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("group", [128, 256])
def test_groups_wider_than_the_format_repeat_their_scales(group: int) -> None:
    tensors, expected = gptq(True, 1, cols=256, group=group)
    matrix = find(tensors, (16, 256), {**GPTQ, "sym": True})
    assert matrix.format.name == "int4_f16_128"
    np.testing.assert_array_equal(read(matrix, tensors), expected)


def test_gptq_with_act_order_is_refused_by_its_name() -> None:
    tensors, _ = gptq(True, 1)
    with pytest.raises(ConfigError, match=r"GPTQ with act-order \(desc_act true\)"):
        find(tensors, (16, 128), {**GPTQ, "sym": True, "desc_act": True})
    tensors["m.g_idx"] = tensors["m.g_idx"].flip(0)
    with pytest.raises(FormatError, match="act-order"):
        read(find(tensors, (16, 128), {**GPTQ, "sym": True}), tensors)


def test_zero_points_that_contradict_the_config_are_refused() -> None:
    tensors, _ = gptq(False, 1)
    with pytest.raises(FormatError, match="a zero point is not 8, though the config says sym"):
        read(find(tensors, (16, 128), {**GPTQ, "sym": True}), tensors)


def test_awq_is_read_without_rounding() -> None:
    rows, cols, group = 24, 128, 32
    codes, zeros = RNG.integers(0, 16, (rows, cols)), RNG.integers(0, 16, (rows, cols // group))
    scales = RNG.normal(size=(rows, cols // group)).astype(np.float16)
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def in_order(values: Array) -> torch.Tensor:
        return words(values.T.reshape(values.shape[1], -1, 8)[..., order].reshape(values.T.shape))

    tensors = {
        "m.qweight": in_order(codes),
        "m.qzeros": in_order(zeros),
        "m.scales": torch.from_numpy(scales.T.copy()),
    }
    matrix = find(tensors, (rows, cols), {"quant_method": "awq", "bits": 4, "version": "gemm"})
    assert matrix.format.name == "int4_offset_f32_32"
    expected = (codes - zeros.repeat(group, 1)) * scales.astype(np.float32).repeat(group, 1)
    np.testing.assert_allclose(read(matrix, tensors), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "int4_32"), (torch.float16, "int4_f16_32")])
def test_pack_quantized_int4_is_read_as_it_lies(dtype: torch.dtype, name: str) -> None:
    rows, cols = 8, 64
    codes = RNG.integers(0, 16, (rows, cols))
    scales = torch.randn(rows, cols // 32).to(dtype)
    tensors = {
        "m.weight_packed": words(codes),
        "m.weight_scale": scales,
        "m.weight_shape": torch.tensor([rows, cols], dtype=torch.int32),
    }
    matrix = find(tensors, (rows, cols), {"quant_method": "compressed-tensors"})
    assert matrix.format.name == name
    assert matrix.needed == ["m.weight_packed", "m.weight_scale"]
    expected = (codes - 8) * scales.float().numpy().repeat(32, 1)
    np.testing.assert_array_equal(read(matrix, tensors), expected.astype(np.float32))


@pytest.mark.parametrize("by", ["compressed-tensors", "modelopt"])
def test_nvfp4_of_both_exporters_decodes_alike(by: str) -> None:
    rows, cols = 6, 64
    codes = RNG.integers(0, 16, (rows, cols))
    scales = torch.rand(rows, cols // 16).mul(400).to(torch.float8_e4m3fn)
    packed = torch.from_numpy((codes[:, ::2] | codes[:, 1::2] << 4).astype(np.uint8))
    factor = 0.0078125  # a power of two: its inverse is exact
    tensors = {"m.weight_scale": scales}
    if by == "modelopt":
        tensors |= {
            "m.weight": packed,
            "m.weight_scale_2": torch.tensor(factor),
            "m.input_scale": torch.ones(()),
        }
    else:
        tensors |= {"m.weight_packed": packed, "m.weight_global_scale": torch.tensor([1 / factor])}
    matrix = find(tensors, (rows, cols), {"quant_method": by})
    expected = E2M1[codes] * scales.float().numpy().repeat(16, 1) * np.float32(factor)
    np.testing.assert_array_equal(read(matrix, tensors), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ending", ["weight_scale_inv", "weight_scale"])
def test_fp8_scales_are_multiplied_also_those_of_tiles_that_are_cut(dtype: torch.dtype, ending: str) -> None:
    rows, cols = 160, 200
    codes = torch.randn(rows, cols).to(torch.float8_e4m3fn)
    scales = (torch.rand(2, 2) + 0.1).to(dtype)
    tensors = {"m.weight": codes, f"m.{ending}": scales}
    matrix = find(tensors, (rows, cols), {"quant_method": "fp8", "weight_block_size": [128, 128]})
    assert matrix.format is FP8_128
    each = scales.float().numpy()[np.arange(rows) // 128][:, np.arange(cols) // 128]
    np.testing.assert_array_equal(read(matrix, tensors), codes.float().numpy() * each)


def test_fp8_with_other_scales_is_refused_with_both_shapes() -> None:
    tensors = {
        "m.weight": torch.zeros(256, 256).to(torch.float8_e4m3fn),
        "m.weight_scale": torch.ones(256, 1),
    }
    with pytest.raises(FormatError, match=r"weight_scale is F32 \[256, 1\]; .* 128x128 tile, here \[2, 2\]"):
        find(tensors, (256, 256), {"quant_method": "fp8", "weight_block_size": [128, 128]})


def test_plain_and_gguf_matrices_are_one_tensor() -> None:
    plain = find({"m.weight": torch.ones(4, 8, dtype=torch.bfloat16)}, (4, 8), {})
    assert plain.format is BF16
    assert torch.equal(
        plain.packed({"m.weight": torch.ones(32).bfloat16().view(torch.uint8)}).decode(), torch.ones(4, 8)
    )
    k = find_matrix("m", (4, 256), {"m.weight": Header("Q4_K", (4, 256))}, QuantizationConfig())
    assert k.format is Q4_K
    assert k.tensors[".weight"].shape == (4, 256)


def test_a_missing_matrix_is_expected_to_be_plain() -> None:
    assert find_matrix("m", (4, 8), {}, QuantizationConfig()).tensors[".weight"].shape == (4, 8)


def test_packed_weights_without_scales_are_refused() -> None:
    with pytest.raises(FormatError, match=r"m\.weight is F8_E4M3 without scales"):
        find({"m.weight": torch.zeros(4, 8).to(torch.float8_e4m3fn)}, (4, 8), {})


def test_gpt_oss_blocks_are_mxfp4_with_gate_and_up_row_by_row() -> None:
    blocks = torch.from_numpy(RNG.integers(0, 256, (6, 5, 16), dtype=np.uint8))
    scales = torch.from_numpy(RNG.integers(100, 140, (6, 5), dtype=np.uint8))
    packed = from_mxfp4_blocks((6, 160), blocks.flatten(), scales.flatten())
    raw = blocks.numpy()
    values = np.stack((E2M1[raw & 15], E2M1[raw >> 4]), -1).reshape(6, 5, 32)
    expected = (values * np.exp2(scales.numpy().astype(np.float32) - 127)[..., None]).reshape(6, 160)
    np.testing.assert_array_equal(packed.decode().numpy(), expected)
    np.testing.assert_array_equal(every_other_row(packed, 0).decode().numpy(), expected[0::2])
    np.testing.assert_array_equal(every_other_row(packed, 1).decode().numpy(), expected[1::2])


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"quant_method": "quip"}, "quant_method 'quip' is not supported; known: fp8, mxfp4"),
        ({"quant_method": "gptq", "bits": 8}, "bits of gptq is 8, expected 4"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version of awq is 'gemv'"),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"g": {"weights": {"type": "int", "num_bits": 8, "strategy": "channel"}}},
            },
            "type, bits and strategy int, 8, channel are not supported",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {
                    "g": {"weights": {"type": "int", "num_bits": 4, "strategy": "group", "actorder": "group"}}
                },
            },
            "actorder group is not supported",
        ),
    ],
)
def test_what_no_format_has_is_refused_by_its_name(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        QuantizationConfig.parse({"quantization_config": raw})
