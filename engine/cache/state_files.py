"""One saved state as a file: what a cache's slot held after a text.

A safetensors file, so nothing in it can be executed. It has all token ids of the text; the rows that the
cache appended for its last part, from `start` on; what the cache held at the end besides; perhaps the logits
there. Rows before `start` are in the file of a shorter text. A checksum of each tensor is among the metadata:
a file that was cut short or changed is found out before anything of it is used.
"""

from __future__ import annotations

import json
import zlib
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
    try:
        with safe_open(path, framework="pt") as opened:
            metadata = _metadata(path, opened)
            tokens = _checked(path, opened, metadata, "tokens").numpy()
            header = StateHeader(
                tokens, int(metadata["start"]), int(metadata["shortest"]), metadata["salt"],
                "logits" in opened.keys(),  # noqa: SIM118 - not a dict
            )  # fmt: skip
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise StateFileError(f"{path}: not a saved state ({error})") from None
    if tokens.dtype != np.int32 or tokens.ndim != 1 or not 0 <= header.start < len(tokens):
        raise StateFileError(f"{path}: not a saved state (its token ids make no sense)")
    return header


def read_state(path: Path) -> State:
    """All of a file, checked. Raises StateFileError."""
    header = read_header(path)
    try:
        with safe_open(path, framework="pt") as opened:
            metadata, names = _metadata(path, opened), set(opened.keys())
            parts = {
                kind: tuple(
                    _checked(path, opened, metadata, f"{kind}.{i}")
                    for i in range(sum(name.startswith(f"{kind}.") for name in names))
                )
                for kind in ("rows", "recent")
            }
            logits = _checked(path, opened, metadata, "logits") if header.has_logits else None
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise StateFileError(f"{path}: not a saved state ({error})") from None
    return State(header, parts["rows"], parts["recent"], logits)


def _metadata(path: Path, opened: Any) -> dict[str, str]:
    found = opened.metadata() or {}
    if found.get("format") != FORMAT:
        raise StateFileError(f"{path}: not a saved state")
    return dict(found)


def _checked(path: Path, opened: Any, metadata: dict[str, str], name: str) -> torch.Tensor:
    tensor: torch.Tensor = opened.get_tensor(name)
    if json.loads(metadata["checksums"])[name] != _checksum(tensor):
        raise StateFileError(f"{path}: {name} is not what was written")
    return tensor


def _checksum(tensor: torch.Tensor) -> int:
    values: Any = tensor.flatten().view(torch.uint8).numpy()
    return int(zlib.crc32(values))
