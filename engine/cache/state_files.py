"""One saved state as a file: what a cache's slot held after a text.

A safetensors file, so nothing in it can be executed. It has all token ids of the text; the rows that the
cache appended for its last part, from `start` on; what the cache held at the end besides; perhaps the logits
there. Rows before `start` are in the file of a shorter text. A checksum of each tensor is among the metadata:
a file that was cut short or changed is found out before anything of it is used.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from memory.user_files import whole_file
from quant.errors import LociError

Ids = NDArray[np.int32]
FORMAT = "loci state 1"
ENDING = ".state.safetensors"


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
    """A header and the tensors: rows and recent as `KvCache.appended` and `recent` have them."""

    header: StateHeader
    rows: tuple[torch.Tensor, ...]
    recent: tuple[torch.Tensor, ...]
    logits: torch.Tensor | None

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        logits = () if self.logits is None else (self.logits,)
        tensors = (*self.rows, *self.recent, *logits)
        return 4 * len(self.header.tokens) + sum(int(tensor.nbytes) for tensor in tensors)


def write_state(path: Path, state: State) -> None:
    """Write a state to a temporary file and rename that. Raises OSError."""
    tensors = {"tokens": torch.from_numpy(state.header.tokens)}
    tensors |= {f"rows.{i}": part for i, part in enumerate(state.rows)}
    tensors |= {f"recent.{i}": part for i, part in enumerate(state.recent)}
    if state.logits is not None:
        tensors["logits"] = state.logits
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    header = state.header
    metadata = {
        "format": FORMAT,
        "start": str(header.start),
        "shortest": str(header.shortest),
        "salt": header.salt,
        "checksums": json.dumps({name: _checksum(tensor) for name, tensor in tensors.items()}),
    }
    with whole_file(path) as temporary:
        temporary.touch(mode=0o600)  # it is somebody's text
        save_file(tensors, temporary, metadata)


def read_header(path: Path) -> StateHeader:
    """What a file holds. Raises StateFileError."""
    with _opened(path) as file:
        return file.header()


def read_state(path: Path) -> State:
    """All of a file, checked. Raises StateFileError."""
    with _opened(path) as file:
        header = file.header()
        logits = file.tensor("logits") if header.has_logits else None
        return State(header, file.tensors("rows"), file.tensors("recent"), logits)


class _File:
    """An open file of a state."""

    def __init__(self, path: Path, opened: Any) -> None:
        self._path, self._opened = path, opened
        self._metadata = opened.metadata() or {}
        if self._metadata.get("format") != FORMAT:
            raise StateFileError(f"{path}: not a saved state")
        self._checksums = json.loads(self._metadata["checksums"])

    def header(self) -> StateHeader:
        tokens, metadata = self.tensor("tokens").numpy(), self._metadata
        header = StateHeader(
            tokens,
            int(metadata["start"]),
            int(metadata["shortest"]),
            metadata["salt"],
            "logits" in self._checksums,
        )
        if tokens.dtype != np.int32 or tokens.ndim != 1 or not 0 <= header.start < len(tokens):
            raise StateFileError(f"{self._path}: not a saved state (its token ids make no sense)")
        return header

    def tensors(self, kind: str) -> tuple[torch.Tensor, ...]:
        """Those of a kind, in order."""
        count = sum(name.startswith(f"{kind}.") for name in self._checksums)
        return tuple(self.tensor(f"{kind}.{i}") for i in range(count))

    def tensor(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._opened.get_tensor(name)
        if self._checksums[name] != _checksum(tensor):
            raise StateFileError(f"{self._path}: {name} is not what was written")
        return tensor


@contextmanager
def _opened(path: Path) -> Iterator[_File]:
    """A file, whatever goes wrong with it told as a StateFileError."""
    try:
        with safe_open(path, framework="pt") as opened:
            yield _File(path, opened)
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise StateFileError(f"{path}: not a saved state ({error})") from None


def _checksum(tensor: torch.Tensor) -> int:
    values: Any = tensor.flatten().view(torch.uint8).numpy()
    return int(zlib.crc32(values))
