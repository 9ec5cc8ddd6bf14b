"""The layout of a safetensors file, computed before its tensors exist.

Layout of a file: 8 bytes little-endian header length, a JSON header naming dtype, shape and byte
range of each tensor, then the bytes. The header is padded with spaces, and tensors of wide items
come first, so that every tensor begins at a multiple of its item size, as readers that map files expect.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from memory.checkpoint.safetensors_files import DTYPE_BITS

DATA_ALIGNMENT = 64


@dataclass(frozen=True)
class PlacedTensor:
    """A tensor of a file to be written; `offset` is from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def place_tensors(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
) -> tuple[bytes, dict[str, PlacedTensor], int]:
    """A file's first bytes (length and header), its tensors' places, and its whole size in bytes.

    tensors: name -> (dtype as safetensors spell it, shape).
    """
    fields: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name in sorted(tensors, key=lambda name: (-DTYPE_BITS[tensors[name][0]], name)):
        dtype, shape = tensors[name]
        end = position + math.prod(shape) * DTYPE_BITS[dtype] // 8
        fields[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % DATA_ALIGNMENT)
    header = len(text).to_bytes(8, "little") + text
    placed = {}
    for name, (dtype, shape) in tensors.items():
        begin, end = fields[name]["data_offsets"]
        placed[name] = PlacedTensor(name, dtype, shape, len(header) + begin, end - begin)
    return header, placed, len(header) + position
