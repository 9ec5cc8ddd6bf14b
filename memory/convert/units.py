"""One piece of a conversion: a bounded block of rows or bytes, read, converted, written.

A unit holds a few megabytes whatever the size of its tensor, reads with `pread` and writes with
`pwrite`, so that any number of them run at once on one pair of files.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from memory.checkpoint.entries import TensorEntry
from memory.checkpoint.safetensors_layout import PlacedTensor
from memory.convert.plan import Convert, Copy, ShardPlan
from quant.convert import Error, convert_rows
from quant.errors import CheckpointError, FormatError
from quant.formats.stored import stored_as, unpack
from quant.packed import Format, PackedTensor

UNIT_VALUES = 1 << 20
UNIT_BYTES = 8 << 20


@dataclass(frozen=True)
class Unit:
    """Bytes, or rows, `start..stop` of a job."""

    job: Copy | Convert
    start: int
    stop: int


@dataclass(frozen=True)
class Written:
    """A range of the output file and the checksum of what was written there."""

    offset: int
    nbytes: int
    checksum: int


@dataclass(frozen=True)
class Done:
    """What a unit did. `error` is None where bytes were copied."""

    unit: Unit
    read_bytes: int
    written: tuple[Written, ...]
    error: Error | None


def units_of(shard: ShardPlan) -> Iterator[Unit]:
    """The pieces of a shard's work, in the order of the file's names."""
    for job in shard.jobs:
        if isinstance(job, Copy):
            whole, step = job.source.nbytes, UNIT_BYTES
        else:
            whole = job.shape[0]
            tile = max(form.tile_rows for form in (job.source, job.target) if isinstance(form, Format))
            step = max(tile, UNIT_VALUES // job.shape[1] // tile * tile)
        for start in range(0, whole, step):
            yield Unit(job, start, min(start + step, whole))


def run_unit(unit: Unit, output: int) -> Done:
    """Do a unit's work into the open file `output`.

    Raises FormatError, CheckpointError or OSError; the first two name the tensor.
    """
    job = unit.job
    if isinstance(job, Copy):
        raw = read_bytes(job.source, unit.start, unit.stop - unit.start)
        written = write_bytes(output, job.output.offset + unit.start, raw)
        return Done(unit, raw.nbytes, (written,), None)
    source, read = _read_rows(job, unit.start, unit.stop)
    try:
        converted, error = convert_rows(source, job.target)
    except FormatError as refusal:
        raise FormatError(f"{job.weight.name}, rows {unit.start}..{unit.stop}: {refusal}") from None
    if isinstance(converted, torch.Tensor):
        written = _write_rows(output, job.weight_output, unit.start, job.shape[0], converted)
        return Done(unit, read, (written,), error)
    assert job.scale_output is not None
    assert converted.scales is not None
    tile_row = unit.start // converted.format.tile_rows
    tile_rows = job.scale_output.shape[0]
    return Done(
        unit,
        read,
        (
            _write_rows(output, job.weight_output, unit.start, job.shape[0], converted.codes),
            _write_rows(output, job.scale_output, tile_row, tile_rows, converted.scales),
        ),
        error,
    )


def _read_rows(job: Convert, start: int, stop: int) -> tuple[PackedTensor | torch.Tensor, int]:
    """Rows of a job's source, and the bytes read for them."""
    rows, cols = job.shape
    if isinstance(job.source, torch.dtype):
        raw = _read_share(job.weight, start, stop, rows)
        return raw.view(job.source).view(stop - start, cols), raw.nbytes
    assert job.scale is not None
    tile = job.source.tile_rows
    codes = _read_share(job.weight, start, stop, rows)
    scales = _read_share(
        job.scale, start // tile, -(-stop // tile), stored_as(job.source, rows, cols)[1].shape[0]
    )
    packed = unpack(job.source, (stop - start, cols), codes, scales, job.scale.dtype)
    return packed, codes.nbytes + scales.nbytes


def _read_share(entry: TensorEntry, start: int, stop: int, rows: int) -> torch.Tensor:
    """The bytes of rows `start..stop` of a tensor of `rows` rows."""
    row_bytes = entry.nbytes // rows
    return read_bytes(entry, start * row_bytes, (stop - start) * row_bytes)


def _write_rows(output: int, place: PlacedTensor, start: int, rows: int, values: torch.Tensor) -> Written:
    row_bytes = place.nbytes // rows
    return write_bytes(
        output, place.offset + start * row_bytes, values.contiguous().flatten().view(torch.uint8)
    )


def read_bytes(entry: TensorEntry, start: int, nbytes: int) -> torch.Tensor:
    """`nbytes` of a tensor from byte `start` on, uint8. Raises CheckpointError where the file ends before."""
    data = torch.empty(nbytes, dtype=torch.uint8)
    view = data.numpy().data
    descriptor = os.open(entry.file, os.O_RDONLY)
    try:
        done = 0
        while done < nbytes:
            got = os.preadv(descriptor, [view[done:]], entry.offset + start + done)
            if got == 0:
                raise CheckpointError(f"{entry.file}: ends inside {entry.name}; download the file again")
            done += got
    finally:
        os.close(descriptor)
    return data


def write_bytes(output: int, offset: int, data: torch.Tensor) -> Written:
    """Write flat uint8 `data` at `offset` of the open file `output`."""
    view = data.numpy().data
    done = 0
    while done < len(view):
        done += os.pwrite(output, view[done:], offset + done)
    return Written(offset, len(view), zlib.crc32(view))


def is_intact(output: int, written: Written) -> bool:
    """True where the file holds what was written."""
    return zlib.crc32(os.pread(output, written.nbytes, written.offset)) == written.checksum
