"""Safetensors directories: index and headers read and cross-checked, tensors left on disk.

Layout of a file: 8 bytes little-endian header length, a JSON header naming dtype, shape and byte
range (relative to the end of the header) of each tensor, then the bytes.

Which files are the model's: those that the index names; else model.safetensors; else the one set of files
that are numbered like model-00001-of-00002.safetensors; else the one file that is left beside those known
to be something else.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from memory.checkpoint.checkpoint import Checkpoint
from memory.checkpoint.entries import TensorEntry
from quant.errors import CheckpointError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
NUMBERED = re.compile(r"(?P<stem>.*)-\d{1,5}-of-(?P<count>\d{1,5})\.safetensors")
# Safetensors files found next to models that are not models: Loci's traces, adapters.
OTHERS = re.compile(r"(routing|engram|adapter.*)\.safetensors")
# Tensors that Loci writes next to models under names that people choose: traces, logits.
RECORDED = {"router_ids", "engram_rows", "logits", "greedy_ids"}
# The same weights again, under the vendor's own names.
COPIES = re.compile(r"consolidated.*\.safetensors")
MAX_HEADER_BYTES = 100 << 20
MAX_JSON_BYTES = 256 << 20
DTYPE_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4,
    "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8,
}  # fmt: skip


def open_safetensors(path: Path) -> Checkpoint:
    """The checkpoint in directory `path`: config, and every tensor's place, from headers alone.

    Raises CheckpointError where there is no checkpoint at all; what is wrong with single shards is
    collected in `Checkpoint.problems`, so that `verify` can report everything at once.
    """
    config = read_json(path / "config.json")
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise CheckpointError(f"{path / 'config.json'}: no model_type; this is not a model's config")
    problems: list[str] = []
    index = read_index(path, problems)
    entries: dict[str, TensorEntry] = {}
    for file_name in _shard_names(path, index):
        for entry in _read_header(path / file_name, problems):
            if entry.name in entries:
                problems.append(f"{entry.name}: in both {entries[entry.name].file.name} and {file_name}")
            entries[entry.name] = entry
    problems.extend(_disagreements(index, entries))
    return Checkpoint(path, model_type, config, entries, problems)


def read_index(path: Path, problems: list[str]) -> dict[str, str]:
    """The index's `weight_map` (tensor -> shard) in directory `path`; empty for a checkpoint without one.

    Names of shards that are not those of files beside it become `problems`. Raises CheckpointError where
    the index is damaged.
    """
    if not (path / INDEX_NAME).exists():
        return {}
    weight_map = read_json(path / INDEX_NAME).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{path / INDEX_NAME}: no weight_map; download the index again")
    good: dict[str, str] = {}
    for name, shard in weight_map.items():
        if isinstance(shard, str) and Path(shard).name == shard and shard not in ("", ".", ".."):
            good[name] = shard
        else:
            problems.append(f"{INDEX_NAME}: {name} names {shard!r}, which is not a file next to the index")
    return good


def weight_files(path: Path) -> list[str]:
    """The names of the files that hold the weights of the model in `path`, whether they are there or not.

    Raises CheckpointError where they cannot be told from other files.
    """
    return _shard_names(path, read_index(path, []))


def _shard_names(path: Path, index: dict[str, str]) -> list[str]:
    if index:
        return sorted(set(index.values()))
    names = candidates(file.name for file in path.glob("*.safetensors"))
    if len(names) > 1:
        names = [name for name in names if not _is_record(path / name)]
    return choose_shards(str(path), names)


def candidates(names: Iterable[str]) -> list[str]:
    """Those of `names` that could be safetensors files of a model."""
    return sorted(
        name
        for name in names
        if name.endswith(".safetensors") and not name.startswith(".") and not OTHERS.fullmatch(name)
    )


def choose_shards(where: str, names: list[str]) -> list[str]:
    """Without an index: which of the `candidates` are the model, and what of a numbered set is missing.

    Raises CheckpointError, naming `where`, if there are none or if it could be several.
    """
    if SINGLE_NAME in names:
        return [SINGLE_NAME]
    names = [name for name in names if not COPIES.fullmatch(name)] or names
    sets = {(found["stem"], found["count"]) for name in names if (found := NUMBERED.fullmatch(name))}
    if len(sets) == 1:
        stem, count = sets.pop()
        return [
            f"{stem}-{number:0{len(count)}}-of-{count}.safetensors" for number in range(1, int(count) + 1)
        ]
    if not names:
        raise CheckpointError(f"{where}: contains neither {INDEX_NAME} nor a .safetensors file of a model")
    if len(names) > 1:
        raise CheckpointError(
            f"{where}: there is no {INDEX_NAME}, and any of {', '.join(names)} could be the model; rename "
            f"the right one to {SINGLE_NAME} or move the others away"
        )
    return names


def _is_record(file: Path) -> bool:
    found = {entry.name for entry in _read_header(file, [])}
    return bool(found) and found <= RECORDED


def _read_header(file: Path, problems: list[str]) -> list[TensorEntry]:
    if not file.exists():
        leads = f", a broken link to {file.readlink()}" if file.is_symlink() else ""
        problems.append(f"missing shard {file.name}{leads}")
        return []
    size = file.stat().st_size
    if not file.is_file() or not os.access(file, os.R_OK):
        problems.append(f"{file.name}: cannot be read; it must be a file that this user may read")
        return []
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            problems.append(f"{file.name}: truncated or not a safetensors file ({size} bytes)")
            return []
        try:
            header = json.loads(stream.read(length))
        except (ValueError, RecursionError):
            problems.append(f"{file.name}: the header is not JSON; download the file again")
            return []
    if not isinstance(header, dict):
        problems.append(f"{file.name}: the header is not a JSON object; download the file again")
        return []
    entries = []
    data_end = 0
    for name, fields in header.items():
        if name == "__metadata__":
            continue
        try:
            entry, end = _entry(name, fields, file, 8 + length)
        except (KeyError, TypeError, ValueError) as error:
            problems.append(f"{file.name}: header entry {name!r} is malformed ({error})")
            continue
        entries.append(entry)
        data_end = max(data_end, end)
    if size < 8 + length + data_end:
        problems.append(
            f"{file.name}: truncated, {size} bytes of {8 + length + data_end}; download the file again"
        )
    return entries


def _entry(name: str, fields: Any, file: Path, data_start: int) -> tuple[TensorEntry, int]:
    dtype, shape = fields["dtype"], tuple(fields["shape"])
    begin, end = fields["data_offsets"]
    if dtype not in DTYPE_BITS:
        raise ValueError(f"unknown dtype {dtype!r}")
    if not all(isinstance(n, int) and n >= 0 for n in (*shape, begin, end)):
        raise ValueError("shape and offsets must be non-negative integers")
    expected = math.prod(shape) * DTYPE_BITS[dtype] // 8
    if end - begin != expected:
        raise ValueError(f"{end - begin} bytes for {dtype} {list(shape)}, expected {expected}")
    return TensorEntry(name, dtype, shape, file, data_start + begin, expected), end


def _disagreements(index: dict[str, str], entries: dict[str, TensorEntry]) -> list[str]:
    """Where index and headers differ; tensors of missing shards are left to `verify`."""
    if not index:
        return []
    found = [
        f"{INDEX_NAME}: {name} should be in {shard} but is in {entries[name].file.name}"
        for name, shard in index.items()
        if name in entries and entries[name].file.name != shard
    ]
    readable = {entry.file.name for entry in entries.values()}
    found += [
        f"{INDEX_NAME}: {name} should be in {shard}, whose header does not have it"
        for name, shard in index.items()
        if name not in entries and shard in readable
    ]
    found += [
        f"{entries[name].file.name}: {name} is not in {INDEX_NAME}" for name in entries.keys() - index.keys()
    ]
    return found


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError for a file that is missing, too large or not JSON."""
    if not file.is_file():
        raise CheckpointError(f"{file}: not found; a model directory needs it")
    if file.stat().st_size > MAX_JSON_BYTES:
        raise CheckpointError(f"{file}: {file.stat().st_size} bytes, implausibly large; download it again")
    try:
        value = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not valid JSON ({error}); download it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: expected a JSON object")
    return value
