"""Routed experts in another format: encoded once, into files in the user's cache, read from there ever after.

Encoding takes far longer than reading (tens of megabytes a second on a core), so experts are not encoded
whenever they move, but once: one safetensors file for each layer, named after the model, the format and the
state of the model's files. Where every tensor will lie follows from shapes, so models can be described and
planned before anything is encoded.
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch

from memory.checkpoint.entries import TensorEntry
from memory.checkpoint.safetensors_layout import PlacedTensor, place_tensors
from memory.convert.units import UNIT_VALUES, Written, read_bytes, write_bytes
from memory.convert.verified import in_parallel, verified_file, worker_pool
from memory.experts.reader import MATRICES, ExpertFiles
from memory.hardware.detect import usable_cores
from memory.user_files import user_cache
from quant.convert import convert_rows
from quant.errors import BudgetError, ConfigError, FormatError
from quant.formats.four_bit import FourBit
from quant.formats.stored import stored_as
from quant.kernels.interface import matrix_shapes
from quant.packed import PackedTensor

WAY_OF_ENCODING = 1  # counted up when other bits come out, so that files of an earlier way are not used
ENDINGS = (".weight", ".scale")  # of a matrix's tensors: codes and scales
SOURCES_NAME = "sources.txt"  # in each folder: the files that its experts come from, one a line
SPARE_BYTES = 64 << 20
SOURCE_BYTES = 1 << 30  # of matrices that are held at once while they are encoded
# Called from one thread with layers that are done, and those that there are to do.
OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class EncodedExperts:
    """The experts of `files` in `format`.

    name_of  (layer, expert, number) -> a matrix's name, without ending
    folder   where the layers' files are, or will be
    """

    files: ExpertFiles
    format: FourBit
    name_of: Callable[[int, int, int], str]
    folder: Path

    @cached_property
    def entries(self) -> dict[str, TensorEntry]:
        """The tensors as they are, or will be: `NAME.weight` and `NAME.scale` of every matrix."""
        return {
            name: TensorEntry(name, place.dtype, place.shape, self._file(layer), place.offset, place.nbytes)
            for layer, plan in enumerate(self._plans)
            for name, place in plan.places.items()
        }

    def missing(self) -> list[int]:
        """Layers that have not been encoded yet."""
        return [layer for layer, plan in enumerate(self._plans) if not self._is_there(layer, plan)]

    def write(self, on_progress: OnProgress, workers: int | None = None) -> None:
        """Encode what is missing; of several processes, one does it, and the others wait.

        A layer's file appears under its name once it is complete and was read back. Raises BudgetError where
        the disk is too small, ConfigError where the folder cannot be written, and CheckpointError or
        FormatError for damaged weights.
        """
        with self._alone():
            sources = "".join(f"{file}\n" for file in _sources_of(self.files))
            (self.folder / SOURCES_NAME).write_text(sources)
            missing = self.missing()
            self._check_disk(missing)
            with worker_pool(workers or self._bounded_workers()) as pool:
                for done, layer in enumerate(missing):
                    on_progress(done, len(missing))
                    self._write_layer(layer, pool)
                on_progress(len(missing), len(missing))

    @cached_property
    def _plans(self) -> list[_LayerPlan]:
        return [self._plan(layer) for layer in range(self.files.layers)]

    def _plan(self, layer: int) -> _LayerPlan:
        tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
        parts = [stored_as(self.format, rows, cols) for rows, cols in self._shapes]
        for expert in range(self.files.experts):
            for number, stored in enumerate(parts):
                for ending, part in zip(ENDINGS, stored, strict=True):
                    tensors[self.name_of(layer, expert, number) + ending] = part.dtypes[0], part.shape
        return _LayerPlan(*place_tensors(tensors))

    @property
    def _shapes(self) -> tuple[tuple[int, int], ...]:
        return matrix_shapes(self.files.hidden, self.files.width)

    def _file(self, layer: int) -> Path:
        return self.folder / f"experts-{layer + 1:05}-of-{self.files.layers:05}.safetensors"

    def _is_there(self, layer: int, plan: _LayerPlan) -> bool:
        file = self._file(layer)
        return file.is_file() and file.stat().st_size == plan.nbytes

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the folder, once nobody else does."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / "lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                yield
        except OSError as error:
            raise ConfigError(
                f"{error.filename or self.folder}: {error.strerror}; experts in another format are kept in "
                f"{_all_folders()}; set XDG_CACHE_HOME to keep them elsewhere"
            ) from None

    def _check_disk(self, missing: list[int]) -> None:
        needed = sum(self._plans[layer].nbytes for layer in missing) + SPARE_BYTES
        free = shutil.disk_usage(self.folder).free
        if missing and free < needed:
            raise BudgetError(
                f"{self.folder}: experts as {self.format.name} need {needed / 1e9:.1f} GB there, but only "
                f"{free / 1e9:.1f} GB is free; free some space, or set XDG_CACHE_HOME to another disk"
            )

    def _bounded_workers(self) -> int:
        largest = max(
            sum(entry.nbytes for entry in self.files.entries(0, 0, numbers[0]))
            for numbers in self.files.together
        )
        return max(1, min(usable_cores(), SOURCE_BYTES // largest))

    def _write_layer(self, layer: int, pool: ThreadPoolExecutor) -> None:
        plan, file = self._plans[layer], self._file(layer)
        part = file.with_suffix(".part")
        with verified_file(part, plan.header, plan.nbytes, pool) as (output, written):
            jobs = (
                partial(self._encode, layer, expert, numbers, output)
                for expert in range(self.files.experts)
                for numbers in self.files.together
            )
            for pieces in in_parallel(pool, jobs):
                written += pieces
        part.replace(file)

    def _encode(self, layer: int, expert: int, numbers: tuple[int, ...], output: int) -> list[Written]:
        """Encode matrices that lie together, a block of rows at a time."""
        entries = self.files.entries(layer, expert, numbers[0])
        raw = {entry.name: read_bytes(entry, 0, entry.nbytes) for entry in entries}
        written: list[Written] = []
        for number in numbers:
            name, (rows, cols) = self.name_of(layer, expert, number), self._shapes[number]
            matrix = self.files.matrix(layer, expert, number, raw)
            places = [self._plans[layer].places[name + ending] for ending in ENDINGS]
            tile = matrix.format.tile_rows
            step = max(tile, UNIT_VALUES // cols // tile * tile)
            for start in range(0, rows, step):
                try:
                    encoded, _ = convert_rows(matrix.rows(start, min(start + step, rows)), self.format)
                except FormatError as refusal:
                    raise FormatError(f"{entries[0].name}, rows from {start} on: {refusal}") from None
                assert isinstance(encoded, PackedTensor)
                assert encoded.scales is not None
                for place, values in zip(places, (encoded.codes, encoded.scales), strict=True):
                    offset = place.offset + start * (place.nbytes // rows)
                    written.append(
                        write_bytes(output, offset, values.contiguous().flatten().view(torch.uint8))
                    )
        return written


@dataclass(frozen=True)
class _LayerPlan:
    """A layer's file: its first bytes, its tensors' places, its size."""

    header: bytes
    places: dict[str, PlacedTensor]
    nbytes: int


def folder_of(name: str, files: ExpertFiles, format_: FourBit) -> Path:
    """Where the experts of the model called `name` are kept in `format_`.

    Another folder for every state of the files that they come from, and for every way of encoding.
    """
    digest = hashlib.sha256(f"{WAY_OF_ENCODING} {format_.name}".encode())
    for file in _sources_of(files):
        found = file.stat()
        digest.update(f"\n{file} {found.st_size} {found.st_mtime_ns}".encode())
    return _all_folders() / f"{name.replace('/', '--')}-{format_.name}-{digest.hexdigest()[:16]}"


def remove_orphans(of: Path) -> int:
    """Remove encoded experts of models that were in directory `of` and are not any more.

    Returns the bytes freed.
    """
    freed, folder = 0, of.resolve()
    for listed in sorted(_all_folders().glob(f"*/{SOURCES_NAME}")):
        sources = [Path(line) for line in listed.read_text().splitlines()]
        if any(source.exists() or not source.is_relative_to(folder) for source in sources):
            continue
        freed += sum(file.stat().st_size for file in listed.parent.iterdir())
        shutil.rmtree(listed.parent)
    return freed


def _all_folders() -> Path:
    return user_cache() / "experts"


def _sources_of(files: ExpertFiles) -> list[Path]:
    """The files that hold experts, without links on the way to them."""
    entries = (
        entry
        for layer in range(files.layers)
        for number in range(MATRICES)
        for expert in range(files.experts)
        for entry in files.entries(layer, expert, number)
    )
    return sorted({file.resolve() for file in {entry.file for entry in entries}})
