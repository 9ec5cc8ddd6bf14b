"""The released checkpoint layout, both ways: a training model's numbers to named tensors, and back.

`to_released` gives every tensor as the files hold it (names, dtypes and codecs of spec section 2);
`from_released` reads such files into a training model, as exact numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from layers import Embedding, Linear, RmsNorm
from model import Gate, Model
from quant.formats.fp8 import FP8_32, FP8_ROW, Fp8
from quant.formats.mxfp4 import MXFP4
from quant.packed import PackedTensor
from quantise import encode_fp4, encode_fp8_rows, encode_fp8_tiles
from stages import Stages

TRAINED_TOKENS = "trained_tokens"  # metadata of every shard
STACKED = ("experts_w13", "experts_w2")


def released_name(parameter: str) -> str:
    """The released spelling of a parameter; stacked experts apart."""
    return parameter.replace(".hc_attn.", ".hc_attn_").replace(".hc_ffn.", ".hc_ffn_")


def storage(model: nn.Module) -> dict[str, str]:
    """How each parameter is stored: `fp8`, `bf16`, or `fp32` where nothing is said."""
    kinds = {}
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            kinds[f"{name}.weight"] = module.stored_as
        elif isinstance(module, RmsNorm | Gate | Embedding):
            kinds[f"{name}.weight"] = "bf16"
    return kinds


def to_released(model: Model) -> Iterator[tuple[str, Tensor]]:
    """Every tensor but the Engram tables, `(name, tensor)` in the model's order."""
    return named_tensors(model)


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter of a training model as the files hold it."""
    kinds = storage(model)
    for parameter, value in model.state_dict().items():
        if parameter.endswith(STACKED):
            yield from _split_experts(parameter, value)
            continue
        name = released_name(parameter)
        kind = kinds.get(parameter, "fp32")
        if kind == "fp8":
            yield from _with_scale(
                name.removesuffix(".weight"), *encode_fp8_tiles(value), torch.float8_e4m3fn
            )
        else:
            yield name, value.to(torch.bfloat16) if kind == "bf16" else value.clone()


def table_to_released(layer: int, table: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The two tensors of one Engram table `[rows, dim]`."""
    yield from _with_scale(f"layers.{layer}.engram.embed", *encode_fp8_rows(table), torch.float8_e4m3fn)


def _with_scale(name: str, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    yield f"{name}.weight", codes.view(dtype)
    yield f"{name}.scale", scales.view(torch.float8_e8m0fnu)


def _split_experts(parameter: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    prefix = parameter.rsplit(".", 1)[0]
    for e, expert in enumerate(value):
        parts = {"w2": expert}
        if parameter.endswith("w13"):
            w1, w3 = expert.chunk(2)
            parts = {"w1": w1, "w3": w3}
        for part, weight in parts.items():
            yield from _with_scale(
                f"{prefix}.experts.{e}.{part}", *encode_fp4(weight.contiguous()), torch.int8
            )


def read_files(path: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint directory as stored."""
    return {name: t for file in sorted(path.glob("*.safetensors")) for name, t in load_file(file).items()}


def trained_tokens(path: Path) -> int:
    """How many tokens the checkpoint at `path` was trained on, as its shards say."""
    with safe_open(next(iter(sorted(path.glob("*.safetensors")))), framework="pt") as shard:
        return int((shard.metadata() or {}).get(TRAINED_TOKENS, 0))


@torch.no_grad()
def from_released(model: Model | Stages, stored: dict[str, Tensor]) -> list[Tensor]:
    """Fill `model` with the numbers of a checkpoint; returns its Engram tables, `[rows, dim]` float32.

    Raises KeyError naming a tensor that the files lack.
    """
    for parameter, value in model.state_dict().items():
        prefix = parameter.rsplit(".", 1)[0]
        if parameter.endswith("experts_w13"):
            for e in range(len(value)):
                halves = [_decode(stored, f"{prefix}.experts.{e}.{part}", FP8_32) for part in ("w1", "w3")]
                value[e] = torch.cat(halves)
        elif parameter.endswith("experts_w2"):
            for e in range(len(value)):
                value[e] = _decode(stored, f"{prefix}.experts.{e}.w2", FP8_32)
        else:
            name = released_name(parameter)
            is_matrix = f"{name.removesuffix('.weight')}.scale" in stored and name.endswith(".weight")
            value.copy_(_decode(stored, name.removesuffix(".weight"), FP8_32) if is_matrix else stored[name])
    return [_decode(stored, f"layers.{n}.engram.embed", FP8_ROW) for n in model.config.engram_layer_ids]


def _decode(stored: dict[str, Tensor], name: str, fp8: Fp8) -> Tensor:
    """The numbers of `name.weight` with `name.scale`; int8 codes are FP4, others `fp8`."""
    codes, scales = stored[f"{name}.weight"], stored[f"{name}.scale"].view(torch.uint8)
    if codes.dtype == torch.int8:
        return PackedTensor(
            MXFP4, (codes.shape[0], codes.shape[1] * 2), codes.view(torch.uint8), scales
        ).decode()
    return PackedTensor(fp8, (codes.shape[0], codes.shape[1]), codes.view(torch.uint8), scales).decode()
