"""A decoder's shape from its config alone, with the bytes that its weights have in the format that it names.

Matrices are bfloat16, biases for the choice of experts and what releases of DeltaNet keep so are float32,
unless `quantization_config` says otherwise.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from engine.families.decoder.family import DecoderFamily
from engine.families.decoder.reencoded import check_has_experts, check_target, target_format
from engine.families.decoder.shape import shape_with
from engine.families.decoder.stored import decoded_value_bytes
from engine.families.decoder.tensors import Use
from engine.families.registry import family_of
from memory.checkpoint.checkpoint import Checkpoint
from memory.planner.shape import ModelShape, Weights
from quant.errors import ConfigError
from quant.formats.fp8 import Fp8
from quant.formats.int4 import INT4_GROUPS
from quant.formats.kv_names import KvChoice
from quant.formats.mxfp4 import MXFP4
from quant.formats.plain import PLAIN
from quant.formats.quantization_config import QuantizationConfig
from quant.packed import Format

# Parts that no release packs, whatever its format; and a module, of indexers.
PLAIN_PARTS = ("embedding", "head", "router")
# Endings of the names of tensors in float32.
SINGLE = ("e_score_correction_bias", "linear_attn.A_log", "linear_attn.norm.weight")
PLAIN_MODULE = "weights_proj"


def config_shape(
    config: Mapping[str, Any], name: str, experts: str | None = None, kv_format: KvChoice = "float32"
) -> ModelShape:
    """The shape of the model of this config.json, its routed experts in the format `experts` if one is named.

    Raises ConfigError for a config that the family cannot run, for a family that needs headers, and for
    experts that cannot be encoded in that format.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise ConfigError(f"{name}: no model_type; this is not a model's config")
    checkpoint = Checkpoint(Path(name), model_type, config, {}, [])
    family = family_of(checkpoint)
    kv = family.kv_format(checkpoint, kv_format)
    if not isinstance(family, DecoderFamily):
        alone = checkpoint if experts is None else family.reencoded(checkpoint, experts)
        return family.config_shape(alone, kv)
    description = family.description(checkpoint)
    weights_of = _weights_of(config)
    if experts is None:
        return shape_with(description, name, weights_of, decoded_value_bytes(config), kv)
    check_has_experts(experts, description, name)
    assert description.experts is not None
    target = target_format(experts, QuantizationConfig.parse(config))
    found = _format_of(config) or PLAIN[torch.bfloat16]
    check_target(experts, target, [found], (description.hidden, description.experts.width))

    def encoded(use: Use) -> Weights:
        if use.part != "experts" or not use.is_matrix:
            return weights_of(use)
        *stacked, rows, cols = use.shape
        return Weights(math.prod(stacked) * target.bytes_for(rows, cols), math.prod(use.shape))

    return shape_with(description, name, encoded, decoded_value_bytes(config), kv)


def _weights_of(config: Mapping[str, Any]) -> Callable[[Use], Weights]:
    quantization = config.get("quantization_config") or {}
    unpacked = [
        PLAIN_MODULE, *quantization.get("modules_to_not_convert", ()), *quantization.get("ignore", ())
    ]  # fmt: skip
    format_ = _format_of(config)

    def weights_of(use: Use) -> Weights:
        values = math.prod(use.shape)
        if use.name.endswith(SINGLE):
            return Weights(4 * values, values)
        is_packed = (
            format_ is not None
            and use.is_matrix
            and use.part not in PLAIN_PARTS
            and (use.part == "experts" or isinstance(format_, Fp8))
            and not any(_covers(module, use.name) for module in unpacked)
        )
        if not is_packed or format_ is None:
            return Weights(2 * values, values)
        *stacked, rows, cols = use.shape
        return Weights(math.prod(stacked) * _packed_bytes(format_, rows, cols), values)

    return weights_of


def _format_of(config: Mapping[str, Any]) -> Format | None:
    """The format of what is packed; None where nothing is."""
    quantization = QuantizationConfig.parse(config)
    if quantization.method is None:
        return None
    known: dict[str, Format] = {
        "fp8": quantization.dense,
        "mxfp4": MXFP4,
        "compressed-tensors": INT4_GROUPS[32],
    }
    if quantization.method not in known:
        raise ConfigError(f"weights of {quantization.method} can be planned from a checkpoint only")
    return known[quantization.method]


def _packed_bytes(format_: Format, rows: int, cols: int) -> int:
    if isinstance(format_, Fp8):  # released with scales in float32, where they are not one byte
        return rows * cols + 4 * math.prod(format_.scale_shape(rows, cols))
    return format_.bytes_for(rows, cols)


def _covers(module: str, name: str) -> bool:
    """Whether a module named in a config is the tensor's, or holds it."""
    parts = name.removesuffix(".weight").split(".")
    return module in parts or any(
        fnmatch.fnmatchcase(".".join(parts[:count]), module) for count in range(1, len(parts) + 1)
    )
