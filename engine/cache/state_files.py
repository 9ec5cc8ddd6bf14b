"""One saved state as a file: what a cache's slot held after a text.

A safetensors file, so nothing in it can be executed. It has all token ids of the text; the rows that the
cache appended for its last part, from `start` on; what the cache held at the end besides; perhaps the logits
there. Rows before `start` are in the file of a shorter text. Tensors are bytes as the cache has them, whose
layout is among the metadata, with a checksum of each piece: a file that was cut short or changed is found out
before anything of it is used.

Pieces are read by several threads, each straight to where the state is wanted, and checked while they are in
the processor's cache.
"""

from __future__ import annotations

import json
import math
import os
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from engine.cache.state_layout import Target, whole_target
from memory.user_files import whole_file
from quant.errors import LociError

Ids = NDArray[np.int32]
FORMAT = "loci state 2"
ENDING = ".state.safetensors"
PIECE = 1 << 20  # bytes that are read and checked at once
MAX_HEADER_BYTES = 100 << 20
MAX_PARTS = 1000  # of one system call; Linux takes 1024


class StateFileError(LociError):
    """A file that does not hold what its name promises."""


@dataclass(frozen=True)
class StateHeader:
    """What is known of a state without reading it.

    tokens    `[length]` int32, the whole text
    start     of the tokens whose rows are in the file
    shortest  length to which the state can be taken back
    salt      digest of what the client's states are kept apart by
    """

    tokens: Ids
    start: int
    shortest: int
    salt: str
    has_logits: bool


@dataclass(frozen=True)
class State:
    """A header and the tensors: rows and recent as `KvCache.appended` and `recent` have them, copied as they
    lie (state_layout.py)."""

    header: StateHeader
    rows: tuple[torch.Tensor, ...]
    recent: tuple[torch.Tensor, ...]
    logits: torch.Tensor | None

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """By the names that they have in the file."""
        found = {"tokens": torch.from_numpy(self.header.tokens)}
        found |= {f"rows.{i}": part for i, part in enumerate(self.rows)}
        found |= {f"recent.{i}": part for i, part in enumerate(self.recent)}
        return found if self.logits is None else found | {"logits": self.logits}

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(int(tensor.nbytes) for tensor in self.tensors.values())


def write_state(path: Path, state: State) -> None:
    """Write a state to a temporary file and rename that. Raises OSError."""
    tensors = state.tensors
    in_bytes = {name: tensor.contiguous().view(-1).view(torch.uint8) for name, tensor in tensors.items()}
    header = state.header
    layouts = {name: [str(tensor.dtype), list(tensor.shape)] for name, tensor in tensors.items()}
    metadata = {
        "format": FORMAT,
        "start": str(header.start),
        "shortest": str(header.shortest),
        "salt": header.salt,
        "layouts": json.dumps(layouts),
        "checksums": json.dumps({name: _checksums(values) for name, values in in_bytes.items()}),
    }
    with whole_file(path) as temporary:
        temporary.touch(mode=0o600)  # it is somebody's text
        save_file(in_bytes, temporary, metadata)


def read_header(path: Path) -> StateHeader:
    """What a file holds. Raises StateFileError."""
    with StateFile(path) as file:
        return file.header


class StateFile:
    """An open file of a state; everything that is wrong with it is told as a StateFileError.

    layouts  of each tensor by name: dtype and shape
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise StateFileError(f"{path}: cannot be opened ({error.strerror})") from None
        try:
            self._read_index()
            self.header = self._header()
        except BaseException as error:
            self.close()
            if isinstance(
                error, KeyError | ValueError | TypeError | AttributeError | RecursionError | OSError
            ):
                raise StateFileError(f"{path}: not a saved state ({error})") from None
            raise

    def __enter__(self) -> StateFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the file back."""
        os.close(self._descriptor)

    def pieces(self, name: str, target: Target) -> list[Callable[[], None]]:
        """What reads a tensor, piece by piece, in any order and by any threads. Each raises StateFileError
        where it is not what was written."""
        checksums = self._checksums.get(name, [])
        if target.nbytes != self._nbytes.get(name) or len(checksums) != math.ceil(target.nbytes / PIECE):
            raise StateFileError(f"{self._path}: {name} has another size than the cache wants")
        return [
            partial(self._read_piece, name, target, number * PIECE, checksum)
            for number, checksum in enumerate(checksums)
        ]

    def _read_piece(self, name: str, target: Target, start: int, checksum: int) -> None:
        stop = min(start + PIECE, target.nbytes)
        unwanted = memoryview(bytearray(stop - start if target.run_bytes < target.file_bytes else 0))
        parts = target.parts(start, stop, unwanted)
        if not parts:
            return
        self._fill(parts, self._begins[name] + start, stop - start)
        found = 0
        for part in parts:
            found = zlib.crc32(part, found)
        if found != checksum:
            raise StateFileError(f"{self._path}: {name} is not what was written")

    def _fill(self, parts: list[memoryview], at: int, nbytes: int) -> None:
        try:
            got = sum(
                os.preadv(self._descriptor, parts[i : i + MAX_PARTS], at + _length(parts[:i]))
                for i in range(0, len(parts), MAX_PARTS)
            )
        except OSError as error:
            raise StateFileError(f"{self._path}: cannot be read ({error.strerror})") from None
        if got != nbytes:
            raise StateFileError(f"{self._path}: ends too early")

    def _read_index(self) -> None:
        """Where the tensors are. Raises KeyError, ValueError, TypeError, AttributeError for what makes no
        sense, OSError."""
        prefix = os.pread(self._descriptor, 8, 0)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        size = os.fstat(self._descriptor).st_size
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise ValueError(f"{size} bytes")
        index = json.loads(os.pread(self._descriptor, length, 8))
        metadata: Mapping[str, Any] = index.pop("__metadata__", {})
        if metadata.get("format") != FORMAT:
            raise ValueError("of another format")
        self._metadata = metadata
        self.layouts: dict[str, list[Any]] = json.loads(metadata["layouts"])
        self._checksums: dict[str, list[int]] = json.loads(metadata["checksums"])
        self._begins: dict[str, int] = {}
        self._nbytes: dict[str, int] = {}
        for name, fields in index.items():
            begin, end = map(int, fields["data_offsets"])
            if not 0 <= begin <= end <= size - 8 - length:
                raise ValueError("it was cut short")
            self._begins[name], self._nbytes[name] = 8 + length + begin, end - begin

    def _header(self) -> StateHeader:
        metadata, nbytes = self._metadata, self._nbytes["tokens"]
        tokens = np.empty(nbytes // 4, np.int32)
        target = whole_target(torch.from_numpy(tokens))
        if target.nbytes != nbytes or not nbytes:
            raise ValueError("its token ids make no sense")
        for read in self.pieces("tokens", target):
            read()
        header = StateHeader(
            tokens,
            int(metadata["start"]),
            int(metadata["shortest"]),
            str(metadata["salt"]),
            "logits" in self._nbytes,
        )
        if not 0 <= header.start < len(tokens):
            raise ValueError("its token ids make no sense")
        return header


def _checksums(values: torch.Tensor) -> list[int]:
    """Of each piece of the bytes."""
    shared: Any = values.numpy()
    view = memoryview(shared)
    return [zlib.crc32(view[at : at + PIECE]) for at in range(0, len(view), PIECE)]


def _length(parts: list[memoryview]) -> int:
    return sum(part.nbytes for part in parts)
