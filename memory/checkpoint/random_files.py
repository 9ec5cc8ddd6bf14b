"""Checkpoints of random weights, written at disk speed.

A plan is pure data: files, their tensors, and how each is filled. Every piece of a tensor has a random
generator of its own, so a seed gives the same bytes whatever the number of threads. A checkpoint is
written under a temporary name beside its place and renamed once all of it is there.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from memory.checkpoint.safetensors_files import INDEX_NAME
from memory.checkpoint.safetensors_layout import PlacedTensor, place_tensors
from memory.hardware.detect import usable_cores
from quant.errors import BudgetError, CheckpointError, ConfigError
from quant.formats.stored import FLOAT_DTYPES

PIECE_BYTES = 8 << 20
SPARE_BYTES = 64 << 20
# The lowest mantissa bit stays clear in e4m3 codes: 0x7f and 0xff, its NaNs, cannot come up.
E4M3_MASK = 0xFEFEFEFEFEFEFEFE
# Called with the bytes that are written and those that there will be.
OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class Normal:
    """Floats of this mean and standard deviation."""

    mean: float
    std: float


@dataclass(frozen=True)
class Codes:
    """Random bytes: four-bit codes two by two, or e4m3 codes without NaN."""


@dataclass(frozen=True)
class PowerScales:
    """ue8m0 scales: 2^exponent or twice that, at random."""

    exponent: int


@dataclass(frozen=True)
class Given:
    """These floats, of PIECE_BYTES at most."""

    values: torch.Tensor


Fill = Normal | Codes | PowerScales | Given


@dataclass(frozen=True)
class RandomTensor:
    """A planned tensor: dtype as safetensors names it, shape, content."""

    dtype: str
    shape: tuple[int, ...]
    fill: Fill


@dataclass(frozen=True)
class RandomCheckpoint:
    """A planned checkpoint: tensors by shard (at least one), config, and texts of other files by name."""

    shards: tuple[Mapping[str, RandomTensor], ...]
    config: Mapping[str, Any]
    texts: Mapping[str, str]

    @property
    def nbytes(self) -> int:
        """Bytes of its files, near enough."""
        placed = sum(_place(shard)[2] for shard in self.shards)
        return placed + sum(len(text.encode()) for text in self.texts.values())


@dataclass(frozen=True)
class Filling:
    """The bytes of a tensor in its file, made in pieces.

    content  at least so many bytes of it, uint8
    unit     bytes of which a piece is a multiple
    """

    name: str
    offset: int
    nbytes: int
    content: Callable[[int, np.random.Generator], np.ndarray]
    unit: int = 1


def write_checkpoint(
    plan: RandomCheckpoint, out: Path, on_progress: OnProgress, *, seed: int = 0, workers: int | None = None
) -> None:
    """Write `plan` as the new directory `out`.

    Raises ConfigError where `out` exists or has no parent directory, BudgetError where the disk has no
    room, CheckpointError if writing fails; in each case nothing is left behind.
    """
    with written_at_once(out, plan.nbytes) as part:
        part.mkdir()
        _write_files(plan, part, on_progress, seed, workers or usable_cores())
        part.chmod(0o755)


@contextmanager
def written_at_once(out: Path, nbytes: int) -> Iterator[Path]:
    """A temporary place beside `out` for about `nbytes` bytes, renamed to it at the end, or removed.

    Raises as `write_checkpoint` does.
    """
    if out.exists() or out.is_symlink():
        raise ConfigError(f"{out}: already exists; name a new one (nothing is overwritten)")
    parent = out.absolute().parent
    if not parent.is_dir():
        raise ConfigError(f"{parent}: no such directory to write to")
    needed, free = nbytes + SPARE_BYTES, shutil.disk_usage(parent).free
    if free < needed:
        raise BudgetError(
            f"{out}: needs {needed / 1e9:.1f} GB, but only {free / 1e9:.1f} GB is free; free some space, "
            "write fewer layers, experts or rows, or name a directory on another disk"
        )
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".part", dir=parent))
    try:
        yield folder / out.name
        (folder / out.name).rename(out)
    except OSError as error:
        raise CheckpointError(
            f"{out}: cannot be written ({error.strerror}); the partial output was removed"
        ) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write_files(
    plan: RandomCheckpoint, part: Path, on_progress: OnProgress, seed: int, workers: int
) -> None:
    total = sum(_place(shard)[2] for shard in plan.shards)
    done = 0
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(plan.shards, start=1):
        name = f"model-{number:05d}-of-{len(plan.shards):05d}.safetensors"
        weight_map |= dict.fromkeys(shard, name)
        for written in _write_shard(shard, part / name, seed, workers):
            done += written
            on_progress(done, total)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    texts = {**plan.texts, INDEX_NAME: _json(index), "config.json": _json(plan.config)}
    for name, text in texts.items():
        (part / name).write_text(text, encoding="utf-8")


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def _place(shard: Mapping[str, RandomTensor]) -> tuple[bytes, dict[str, PlacedTensor], int]:
    return place_tensors({name: (tensor.dtype, tensor.shape) for name, tensor in shard.items()})


def _write_shard(shard: Mapping[str, RandomTensor], file: Path, seed: int, workers: int) -> Iterator[int]:
    """Write one file; yields the bytes of each piece that is written."""
    header, placed, _ = _place(shard)
    with file.open("wb") as stream:
        stream.write(header)
        yield len(header)
        fillings = [
            Filling(
                tensor.name, tensor.offset, tensor.nbytes, partial(_piece, tensor.dtype, shard[name].fill)
            )
            for name, tensor in placed.items()
        ]
        yield from fill(stream, fillings, seed, workers)


def fill(stream: BinaryIO, fillings: Iterable[Filling], seed: int, workers: int) -> Iterator[int]:
    """Write tensors into an open file; yields the bytes of each piece that is written."""
    stream.flush()
    output = stream.fileno()

    def write(piece: tuple[Filling, int, int]) -> int:
        tensor, number, start = piece
        nbytes = min(_piece_bytes(tensor), tensor.nbytes - start)
        random = np.random.Generator(np.random.SFC64([seed, zlib.crc32(tensor.name.encode()), number]))
        content = tensor.content(nbytes, random).data
        written = 0
        while written < nbytes:
            written += os.pwrite(output, content[written:nbytes], tensor.offset + start + written)
        return nbytes

    pieces = (
        (tensor, number, start)
        for tensor in sorted(fillings, key=lambda tensor: tensor.offset)
        for number, start in enumerate(range(0, tensor.nbytes, _piece_bytes(tensor)))
    )
    # The threads end before the file is closed: none may still be writing to it then.
    with ThreadPoolExecutor(workers, "random") as pool:
        yield from pool.map(write, pieces)
    os.fsync(output)
    # What is read next is to come from the disk, as it would with a checkpoint that was there before.
    os.posix_fadvise(output, 0, 0, os.POSIX_FADV_DONTNEED)


def _piece_bytes(tensor: Filling) -> int:
    return PIECE_BYTES // tensor.unit * tensor.unit


def _piece(dtype: str, content: Fill, nbytes: int, random: np.random.Generator) -> np.ndarray:
    """At least `nbytes` bytes of a tensor's content, uint8."""
    if isinstance(content, Given):
        return content.values.to(FLOAT_DTYPES[dtype]).flatten().view(torch.uint8).numpy()
    if isinstance(content, Normal):
        kind = FLOAT_DTYPES[dtype]
        values = random.standard_normal(-(-nbytes // kind.itemsize), dtype=np.float32)
        values *= content.std
        values += content.mean
        return torch.from_numpy(values).to(kind).view(torch.uint8).numpy()
    words = random.integers(0, 1 << 64, -(-nbytes // 8), dtype=np.uint64)
    if isinstance(content, Codes):
        if dtype == "F8_E4M3":
            words &= np.uint64(E4M3_MASK)
        return words.view(np.uint8)
    bits = words.view(np.uint8)
    bits &= 1
    bits += np.uint8(127 + content.exponent)
    return bits


def e4m3_rms() -> float:
    """Root mean square of the e4m3 codes that `Codes` draws."""
    codes = (torch.arange(256) & E4M3_MASK & 0xFF).to(torch.uint8)
    return float(codes.view(torch.float8_e4m3fn).float().square().mean().sqrt())


def scales_for(std: float, codes_rms: float) -> PowerScales:
    """Scales that bring codes of `codes_rms` to about `std`, a little less rather than more."""
    mean_scale = math.sqrt((1 + 4) / 2)  # of 1 and 2
    return PowerScales(math.floor(math.log2(std / (codes_rms * mean_scale))))
