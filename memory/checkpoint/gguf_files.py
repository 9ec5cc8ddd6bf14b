"""GGUF files as checkpoints: metadata, tensor headers and tensors in one file, or in several parts.

The `gguf` package reads the layout. Only headers are touched; tensors are byte ranges of the files
until a family reads them. A tensor's shape is given with the fastest dimension last, so that a
matrix is `[rows, cols]` as everywhere in Loci (GGUF itself lists dimensions the other way round).

Large models come in parts that llama.cpp's splitter names NAME-00001-of-00003.gguf: the first has the model's
metadata, each has its own tensors.
"""

from __future__ import annotations

import math
import os
import re
import struct
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import numpy.typing as npt

from memory.checkpoint.checkpoint import Checkpoint
from memory.checkpoint.entries import TensorEntry
from quant.errors import CheckpointError

MAGIC = b"GGUF"
PART = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)
MAX_PARTS = 10_000


def is_gguf(path: Path) -> bool:
    """True where `path` is a file that begins like a GGUF file."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def open_gguf(path: Path) -> Checkpoint:
    """The checkpoint in the GGUF file at `path`, any part of it if it has several; no tensor is read.

    Its config is the (first) file's metadata under its flat keys (`llama.block_count`), its model type
    `general.architecture`, an entry's dtype the GGUF type's name (`Q4_1`). Raises CheckpointError
    for a file that is missing, truncated, damaged or not GGUF, naming all parts that are missing.
    """
    metadata, entries = _read(path)
    count = metadata.get("split.count", 1)
    if count != 1:
        metadata, entries = _read_parts(path, count)
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise CheckpointError(f"{path}: the metadata has no general.architecture")
    return Checkpoint(path, architecture, metadata, entries, [])


def _read_parts(path: Path, count: Any) -> tuple[dict[str, Any], dict[str, TensorEntry]]:
    """Metadata of the first part and tensors of all, given any of them."""
    named = PART.fullmatch(path.name)
    if named is None or not isinstance(count, int) or int(named["count"]) != count or count > MAX_PARTS:
        raise CheckpointError(
            f"{path}: one of {count} parts, but its name does not say which; the parts' names must end in "
            f"-00001-of-{count:0>5}.gguf and so on"
        )
    parts = [
        path.with_name(f"{named['stem']}-{number:05}-of-{named['count']}{path.suffix}")
        for number in range(1, count + 1)
    ]
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise CheckpointError(
            f"{path}: of its {count} parts {len(missing)} are missing: {', '.join(missing)}; download them "
            f"to {path.parent}"
        )
    metadata: dict[str, Any] = {}
    entries: dict[str, TensorEntry] = {}
    for number, part in enumerate(parts):
        of_part, tensors = _read(part)
        if (of_part.get("split.no"), of_part.get("split.count")) != (number, count):
            raise CheckpointError(
                f"{part}: says that it is part {of_part.get('split.no')} (counted from 0) of "
                f"{of_part.get('split.count')}, expected {number} of {count}; download the parts again"
            )
        if twice := entries.keys() & tensors.keys():
            raise CheckpointError(f"{part}: {min(twice)} is in an earlier part too; download the parts again")
        metadata = metadata or of_part
        entries |= tensors
    expected = metadata.get("split.tensors.count", len(entries))
    if expected != len(entries):
        raise CheckpointError(
            f"{path}: {len(entries)} tensors in its {count} parts, expected {expected}; download them again"
        )
    return metadata, entries


def _read(path: Path) -> tuple[dict[str, Any], dict[str, TensorEntry]]:
    """Metadata and tensors of one file."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    if not is_gguf(path):
        raise CheckpointError(f"{path}: not a GGUF file (it does not begin with the letters GGUF)")
    try:
        reader = _Reader(path)
        metadata = {
            name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")
        }
        entries = {tensor.name: _entry(tensor, path) for tensor in reader.tensors}
    except _TruncatedError as error:
        raise CheckpointError(
            f"{path}: truncated: {path.stat().st_size} bytes, expected at least {error}; download it again"
        ) from None
    except (ValueError, KeyError, IndexError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged GGUF file ({error}); download it again") from None
    if reader.byte_order != "I":
        raise CheckpointError(
            f"{path}: written in the other byte order; convert it on a machine of that byte order"
        )
    return metadata, entries


def data_offset(path: Path) -> int | None:
    """Where in the GGUF file at `path` its tensors' bytes begin; None where it cannot be read so far."""
    try:
        return int(_Reader(path).data_offset)
    except (_TruncatedError, ValueError, KeyError, IndexError, OverflowError, RecursionError):
        return None


ARCHITECTURE = b"general.architecture"
_STRING = 8  # GGUF's number for the type


def architecture_of(path: Path) -> str | None:
    """The architecture that the GGUF file at `path` names first, as every converter writes it; else None.

    Reads a few bytes, and leaves the time of the last access as it was where the system allows it.
    """
    try:
        with open(path, "rb", opener=_unnoticed) as file:  # Path.open takes no opener
            head = file.read(256)
    except OSError:
        return None
    start = 24 + 8 + len(ARCHITECTURE)  # behind magic, version, two counts, and the key with its length
    if head[:4] != MAGIC or head[32:start] != ARCHITECTURE:
        return None
    kind, length = struct.unpack_from("<IQ", head, start)
    name = head[start + 12 : start + 12 + length]
    return name.decode("utf-8", "replace") if kind == _STRING and len(name) == length else None


def _unnoticed(path: str, flags: int) -> int:
    try:
        return os.open(path, flags | os.O_NOATIME)
    except PermissionError:  # somebody else's file
        return os.open(path, flags)


class _TruncatedError(Exception):
    """The file ends before the byte that is named."""


class _Reader(gguf.GGUFReader):
    """The package's reader with one method replaced: how it cuts a value out of the file.

    The package's own costs six microseconds a cut, 1.5 seconds for a vocabulary with its merges; and it
    takes a cut that is shorter than asked for as it is, so that a wrong length in a damaged file sends
    it far beyond the end.
    """

    def _get(
        self,
        offset: int,
        dtype: npt.DTypeLike,
        count: int = 1,
        override_order: Literal["I", "S", "<"] | None = None,
    ) -> npt.NDArray[Any]:
        dtype = np.dtype(dtype)
        end = int(offset) + int(count) * dtype.itemsize
        if end > self.data.size:
            raise _TruncatedError(end)
        order = override_order or self.byte_order
        if order != "I":
            dtype = dtype.newbyteorder(order)
        return np.ndarray(int(count), dtype, buffer=self.data, offset=int(offset))


def _entry(tensor: Any, path: Path) -> TensorEntry:
    shape = tuple(int(n) for n in reversed(tensor.shape.tolist()))
    block, block_bytes = gguf.GGML_QUANT_SIZES[tensor.tensor_type]
    nbytes = math.prod(shape) * block_bytes // block
    if nbytes != tensor.n_bytes:
        raise ValueError(f"{tensor.name}: {tensor.n_bytes} bytes for the shape {list(shape)}")
    return TensorEntry(tensor.name, tensor.tensor_type.name, shape, path, tensor.data_offset, nbytes)
