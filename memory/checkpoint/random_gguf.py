"""GGUF files of random weights, written at disk speed under a temporary name and renamed once whole."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

from memory.checkpoint.random_blocks import RandomValues
from memory.checkpoint.random_files import OnProgress, fill, written_at_once
from memory.hardware.detect import usable_cores

Value = str | int | float | bool | list[str] | list[int]
ARCHITECTURE = "general.architecture"


@dataclass(frozen=True)
class RandomGguf:
    """A planned file: metadata by key, and of each tensor its shape `[..., cols]` and its values."""

    metadata: Mapping[str, Value]
    tensors: Mapping[str, tuple[tuple[int, ...], RandomValues]]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors; metadata adds little."""
        return sum(values.nbytes(math.prod(shape)) for shape, values in self.tensors.values())


def write_gguf(
    plan: RandomGguf, out: Path, on_progress: OnProgress, *, seed: int = 0, workers: int | None = None
) -> None:
    """Write `plan` as the new file `out`.

    Raises ConfigError where `out` exists or has no parent directory, BudgetError where the disk has no
    room, CheckpointError if writing fails; in each case nothing is left behind.
    """
    with written_at_once(out, plan.nbytes) as part:
        at = _write_header(plan, part)
        fillings = []
        for name, (shape, values) in plan.tensors.items():
            filling = values.filling(name, at, math.prod(shape))
            fillings.append(filling)
            at = _aligned(at + filling.nbytes)
        done = 0
        with part.open("r+b") as stream:
            stream.truncate(at)
            for written in fill(stream, fillings, seed, workers or usable_cores()):
                done += written
                on_progress(done, plan.nbytes)


def _write_header(plan: RandomGguf, file: Path) -> int:
    """Write metadata and the table of tensors; where the first tensor begins."""
    writer = gguf.GGUFWriter(file, str(plan.metadata[ARCHITECTURE]))
    for key, value in plan.metadata.items():
        if key != ARCHITECTURE:  # which the writer puts first
            _add(writer, key, value)
    for name, (shape, values) in plan.tensors.items():
        kind = gguf.GGMLQuantizationType[values.dtype]
        nbytes = values.nbytes(math.prod(shape))
        writer.add_tensor_info(name, shape, np.dtype(np.float32), nbytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return _aligned(file.stat().st_size)


def _add(writer: gguf.GGUFWriter, key: str, value: Value) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _aligned(at: int) -> int:
    return -(-at // gguf.GGUF_DEFAULT_ALIGNMENT) * gguf.GGUF_DEFAULT_ALIGNMENT
