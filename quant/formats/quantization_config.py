"""`quantization_config` of config.json: what it says of packed weights, read and written.

Of other methods than `fp8` (`mxfp4` of gpt-oss, `compressed-tensors`, `gptq`, `awq`, `modelopt`) only what no
format here has is looked for, and refused. Which tensors hold a matrix is found from headers
(`quant/formats/stored_matrix.py`).

Keys of the released layout: quant_method, activation_scheme, weight_block_size, scale_fmt, expert_dtype
(`fp4`). Added here: further values of expert_dtype (`nf4`, `int4`, `bf16`), int4_group_size,
int4_offset, dense_dtype (`fp8`, `bf16`), engram_dtype (`fp8`, `fp4`, `bf16`). docs/quantize.md has them
as a table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from quant.errors import ConfigError
from quant.formats.fp8 import FP8_32, FP8_128, Fp8
from quant.formats.int4 import INT4_GROUPS, INT4_OFFSET_GROUPS, Int4, Int4Offset
from quant.packed import Format

DENSE_FORMATS = {(32, 32): FP8_32, (128, 128): FP8_128}
METHODS = ("fp8", "mxfp4", "compressed-tensors", "gptq", "awq", "modelopt")


class Role(StrEnum):
    """What a weight is to the model."""

    EXPERT = "expert"
    DENSE = "dense"
    ENGRAM = "engram"


@dataclass(frozen=True)
class QuantizationConfig:
    """What must be known of packed weights beyond the dtypes in file headers.

    dense           the FP8 format of dense matrices: `weight_block_size`
    int4            the INT4 format: `int4_group_size` and `int4_offset`
    method          `quant_method`, None where there is none
    has_zeros       of GPTQ and AWQ: groups have zero points of their own (not `sym`)
    zeros_less_one  of GPTQ: zero points are stored less one (`checkpoint_format` is not `gptq_v2`)
    is_exact_in_bfloat16  scales of FP8 matrices are powers of two (`scale_fmt`), so bfloat16 has their values
    """

    dense: Fp8 = FP8_32
    int4: Int4 = INT4_GROUPS[32]
    method: str | None = None
    has_zeros: bool = False
    zeros_less_one: bool = False
    is_exact_in_bfloat16: bool = False

    @classmethod
    def parse(cls, config: Mapping[str, Any]) -> QuantizationConfig:
        """From a whole config.json; raises ConfigError for settings that no format here has."""
        raw = config.get("quantization_config") or {}
        if not isinstance(raw, Mapping):
            raise ConfigError("config.json: quantization_config is not an object")
        method = raw.get("quant_method")
        if method is not None and method not in METHODS:
            raise ConfigError(
                f"quantization_config: quant_method {method!r} is not supported; known: {', '.join(METHODS)}"
            )
        _check_method(raw)
        tile = raw.get("weight_block_size") or [32, 32]
        if not isinstance(tile, list) or tuple(tile) not in DENSE_FORMATS:
            raise ConfigError(
                f"quantization_config: weight_block_size is {tile}, expected [32, 32] or [128, 128]"
            )
        group = raw.get("int4_group_size", 32)
        if group not in INT4_GROUPS:
            raise ConfigError(f"quantization_config: int4_group_size is {group!r}, expected 32, 64 or 128")
        offset = raw.get("int4_offset", False)
        if not isinstance(offset, bool):
            raise ConfigError(f"quantization_config: int4_offset is {offset!r}, expected true or false")
        int4 = (INT4_OFFSET_GROUPS if offset else INT4_GROUPS)[group]
        return cls(
            DENSE_FORMATS[tile[0], tile[1]],
            int4,
            method,
            has_zeros=method == "awq" or (method == "gptq" and raw.get("sym") is not True),
            zeros_less_one=method == "gptq" and raw.get("checkpoint_format") != "gptq_v2",
            is_exact_in_bfloat16=method == "fp8" and raw.get("scale_fmt") == "ue8m0",
        )


def _check_method(raw: Mapping[str, Any]) -> None:
    """Raise ConfigError for settings of a method that no format here has."""
    method = raw.get("quant_method")
    wanted: dict[str, tuple[Any, ...]] = {}
    if method == "gptq":
        wanted = {"bits": (4,), "checkpoint_format": (None, "", "gptq", "gptq_v2")}
        if raw.get("desc_act"):
            raise ConfigError(
                "quantization_config: GPTQ with act-order (desc_act true) is not supported; choose a "
                "checkpoint that was made without it"
            )
    elif method == "awq":
        wanted = {"bits": (4,), "version": (None, "gemm", "GEMM"), "zero_point": (None, True)}
    elif method == "modelopt":
        wanted = {"quant_algo": (None, "NVFP4")}
    for key, values in wanted.items():
        if raw.get(key) not in values:
            expected = " or ".join(repr(value) for value in values if value)
            raise ConfigError(
                f"quantization_config: {key} of {method} is {raw.get(key)!r}, expected {expected}; choose "
                "another checkpoint of the model"
            )
    if method == "compressed-tensors":
        groups = raw.get("config_groups")
        for group in groups.values() if isinstance(groups, Mapping) else ():
            _check_compressed(group.get("weights") if isinstance(group, Mapping) else None)


def _check_compressed(weights: Any) -> None:
    """The `weights` of a group of compressed-tensors: INT4 or NVFP4 groups, or FP8 tiles."""
    if not isinstance(weights, Mapping):
        raise ConfigError("quantization_config: a group of config_groups has no weights")
    kind = (weights.get("type"), weights.get("num_bits"), weights.get("strategy"))
    known = [("int", 4, "group"), ("float", 4, "tensor_group"), ("float", 8, "block")]
    if kind not in known or not weights.get("symmetric", True):
        found = ", ".join(map(str, kind)) + ("" if weights.get("symmetric", True) else ", not symmetric")
        raise ConfigError(
            f"quantization_config: compressed-tensors weights of type, bits and strategy {found} are not "
            f"supported; known: {'; '.join(', '.join(map(str, each)) for each in known)}; all symmetric"
        )
    if weights.get("actorder") not in (None, "static", "weight"):
        raise ConfigError(
            f"quantization_config: compressed-tensors with actorder {weights['actorder']} is not supported; "
            "choose a checkpoint that was made without it"
        )


def describe_formats(config: Mapping[str, Any], formats: Mapping[Role, set[Format | None]]) -> dict[str, Any]:
    """`config` (a whole config.json) with a `quantization_config` that says what `formats` holds.

    formats: the formats that the weights of each role are in, None for plain floats. What the config
    said otherwise is kept; where nothing is packed there is no `quantization_config`.
    """
    described = {key: value for key, value in config.items() if key != "quantization_config"}
    packed = {format_ for of_role in formats.values() for format_ in of_role if format_ is not None}
    if not packed:
        return described
    raw = dict(config.get("quantization_config") or {})
    for key in ("int4_group_size", "int4_offset"):
        raw.pop(key, None)
    raw.setdefault("quant_method", "fp8")
    raw.setdefault("activation_scheme", "dynamic")
    raw.setdefault("weight_block_size", [FP8_32.tile_rows, FP8_32.tile_cols])
    raw["scale_fmt"] = "ue8m0"
    for format_ in packed:
        if isinstance(format_, Int4):
            raw["int4_group_size"] = format_.tile_cols
            raw["int4_offset"] = isinstance(format_, Int4Offset)
    for dense in formats[Role.DENSE]:
        if isinstance(dense, Fp8):
            raw["weight_block_size"] = [dense.tile_rows, dense.tile_cols]
    for role in Role:
        names = {_short_name(format_) for format_ in formats[role]}
        if names:
            # A dense matrix without scales says so by its dtype: one FP8 matrix makes the model fp8.
            raw[f"{role}_dtype"] = "fp8" if "fp8" in names else min(names)
    return {**described, "quantization_config": raw}


def _short_name(format_: Format | None) -> str:
    """As `expert_dtype` spells it."""
    if format_ is None:
        return "bf16"
    if isinstance(format_, Fp8):
        return "fp8"
    return "int4" if isinstance(format_, Int4) else {"mxfp4": "fp4"}.get(format_.name, format_.name)
