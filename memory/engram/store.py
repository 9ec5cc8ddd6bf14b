"""The Engram store: rows of n-gram tables, requested before they are needed.

Of each table, DRAM holds the share that it was given: all of it, or hot rows (rows.py). Native threads look
up rows while earlier layers compute: they deduplicate, keep many disk requests in flight and decode.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from memory.checkpoint.checkpoint import Checkpoint
from memory.checkpoint.direct_reads import DirectFiles
from memory.checkpoint.entries import TensorEntry
from memory.checkpoint.reads import RowsOnDisk
from memory.engram.rows import HotRows, RowCounts, RowJob, RowServer, RowTable, TableShare
from memory.engram.sender import RowSender
from memory.telemetry import Telemetry
from memory.tiers import Tier
from quant.errors import CheckpointError
from quant.formats.fp8 import FP8_ROW
from quant.formats.stored import unpack
from quant.kernels.cpu.library import LibraryMissingError
from quant.kernels.interface import Kernels
from quant.packed import Format, PackedTensor

THREADS = 4  # concurrent lookups; each keeps many disk requests in flight
LINK = "engram"  # the name of its bytes and stalls in Telemetry


@dataclass(frozen=True)
class TableFiles:
    """The location of a table `[rows, dim]`: its codes and scales, and their format, row by row."""

    codes: TensorEntry
    scales: TensorEntry
    format: Format
    dim: int

    @property
    def rows(self) -> int:
        """Rows of the table."""
        return self.codes.shape[0]

    @property
    def code_bytes(self) -> int:
        """Bytes of a row's codes."""
        return self.codes.nbytes // self.rows

    @property
    def scale_bytes(self) -> int:
        """Bytes of a row's scales."""
        return self.scales.nbytes // self.rows

    @property
    def nbytes(self) -> int:
        """Bytes of the whole table."""
        return self.codes.nbytes + self.scales.nbytes

    def share(self, budget_bytes: int) -> TableShare:
        """What of it a budget holds."""
        return TableShare.within(budget_bytes, self.rows, self.code_bytes, self.scale_bytes)

    def unpack(self, codes: torch.Tensor, scales: torch.Tensor) -> PackedTensor:
        """Rows from the raw bytes of their codes `[n, code_bytes]` and scales `[n, scale_bytes]`."""
        shape = (codes.shape[0], self.dim)
        return unpack(self.format, shape, codes.flatten(), scales.flatten(), self.scales.dtype)


class RowsTicket(Protocol):
    """A pending lookup."""

    @property
    def is_done(self) -> bool:
        """True once `wait` would not block."""
        ...

    def wait(self) -> torch.Tensor:
        """The rows, `[n, dim]` float32, on the layer's device; raises the lookup's error."""
        ...


class ReadyRows:
    """The result of a lookup that is already complete."""

    is_done = True

    def __init__(self, rows: torch.Tensor) -> None:
        self._rows = rows

    def wait(self) -> torch.Tensor:
        return self._rows

    def arrive(self) -> torch.Tensor:
        return self._rows


class _ServedRows:
    """A lookup on the store's threads. `counts` is set once `arrive` or `wait` has returned."""

    def __init__(self, job: RowJob, table: _Table, telemetry: Telemetry) -> None:
        self._job = job
        self._table = table
        self._telemetry = telemetry
        self.counts: RowCounts | None = None

    @property
    def is_done(self) -> bool:
        return self.counts is not None or self._job.is_done

    def wait(self) -> torch.Tensor:
        """Like `arrive`; waiting here counts as the store's stall."""
        if self.is_done:
            return self.arrive()
        start = time.perf_counter()
        try:
            return self.arrive()
        finally:
            self._telemetry.add("stalled_s", f"{LINK} demand", time.perf_counter() - start)

    def arrive(self) -> torch.Tensor:
        """The rows, `[n, dim]` float32. Raises CheckpointError if they cannot be read."""
        if self.counts is None:
            try:
                self.counts = self._job.wait()
            except CheckpointError as error:
                self._telemetry.add("failed", f"{LINK} demand")
                raise CheckpointError(f"{self._table.files.codes.file}: {error}") from None
            for label in ("asked", "unique", "cached", "read"):
                self._telemetry.add("rows", label, getattr(self.counts, label))
            self._telemetry.add("moved_bytes", LINK, self.counts.read_bytes)
        return self._table.numbers(self._job.out)


class _Table:
    """The share of a table that is in DRAM, for the lookup threads."""

    def __init__(self, files: TableFiles, direct: DirectFiles, kernels: Kernels, share: TableShare) -> None:
        self.files = files
        self._kernels = kernels
        self._decodes = files.format is FP8_ROW
        self._codes = direct.load(files.codes) if share.is_whole else None
        self._scales = direct.load(files.scales) if share.holds_scales else None
        row_bytes = files.code_bytes + (0 if share.holds_scales else files.scale_bytes)
        self._hot = HotRows.of(share.sets, row_bytes)
        self.native = RowTable(
            codes=None if self._codes is None else self._codes.data_ptr(),
            scales=None if self._scales is None else self._scales.data_ptr(),
            rows=files.rows,
            cols=files.dim,
            code_bytes=files.code_bytes,
            scale_bytes=files.scale_bytes,
            decodes=self._decodes,
            float_scales=files.scales.dtype == "F32",
            codes_file=direct.descriptor(files.codes.file),
            codes_at=files.codes.offset,
            scales_file=direct.descriptor(files.scales.file),
            scales_at=files.scales.offset,
            sets=self._hot.sets,
            tags=self._hot.tags.data_ptr(),
            stamps=self._hot.stamps.data_ptr(),
            hot=self._hot.rows.data_ptr(),
        )

    @property
    def whole(self) -> RowTable | None:
        """The table, if all of it is in DRAM and its rows can be decoded natively."""
        return self.native if self._decodes and self._codes is not None else None

    @property
    def nbytes(self) -> int:
        held = [tensor.nbytes for tensor in (self._codes, self._scales) if tensor is not None]
        return sum(held) + self._hot.nbytes

    def room(self, n: int, *, pinned: bool) -> torch.Tensor:
        """The output buffer of a lookup of n rows."""
        if self._decodes:
            return torch.empty(n, self.files.dim, pin_memory=pinned)
        return torch.empty(n, self.files.code_bytes + self.files.scale_bytes, dtype=torch.uint8)

    def numbers(self, answer: torch.Tensor) -> torch.Tensor:
        """The rows of an output buffer, `[n, dim]` float32."""
        if self._decodes:
            return answer
        codes, scales = answer.tensor_split([self.files.code_bytes], dim=1)
        return self._kernels.gather_rows(self.files.unpack(codes, scales), torch.arange(len(answer)))


class EngramStore:
    """Tables by layer. `lookup` may be called as soon as token ids are known.

    shares: what of each is in DRAM
    gpus: devices of layers that are not computed in host memory; their rows are sent there. Without the
    compiled kernels, tables stay on disk and lookups are synchronous.
    """

    def __init__(
        self,
        tables: Mapping[int, TableFiles],
        checkpoint: Checkpoint,
        kernels: Kernels,
        shares: Mapping[int, TableShare],
        telemetry: Telemetry,
        *,
        gpus: Mapping[int, Tier] | None = None,
    ) -> None:
        self.files = tables
        self._kernels = kernels
        self._telemetry = telemetry
        gpus = {layer: gpu for layer, gpu in (gpus or {}).items() if layer in tables}
        senders = {gpu: RowSender(gpu, telemetry) for gpu in set(gpus.values())}
        self._senders = {layer: senders[gpu] for layer, gpu in gpus.items()}
        self._pinned = {layer for layer, gpu in gpus.items() if gpu.device.type == "cuda"}
        self._direct = DirectFiles()
        self._server: RowServer | None = None
        self._tables: dict[int, _Table] = {}
        # Rows that native code has found in tables by itself: asked for, and different ones.
        self.native_counts = torch.zeros(2, dtype=torch.int64)
        asked, unique = (self.native_counts[n : n + 1] for n in range(2))
        for label, count in (("asked", asked), ("unique", unique), ("cached", unique)):
            telemetry.follow("rows", label, count)
        self._on_disk: dict[int, tuple[RowsOnDisk, RowsOnDisk]] = {}
        if not tables:
            return
        try:
            self._server = RowServer(THREADS)
        except LibraryMissingError:
            for layer, files in tables.items():
                self._on_disk[layer] = RowsOnDisk(files.codes), RowsOnDisk(files.scales)
            return
        self._direct.open([entry.file for files in tables.values() for entry in (files.codes, files.scales)])
        self._numbers: dict[int, int] = {}
        for layer, files in tables.items():
            self._tables[layer] = _Table(files, self._direct, kernels, shares[layer])
            self._numbers[layer] = self._server.add(self._tables[layer].native)

    @property
    def nbytes(self) -> int:
        """Bytes of DRAM that tables and caches hold."""
        return sum(table.nbytes for table in self._tables.values())

    def in_memory(self, layer: int) -> RowTable | None:
        """A layer's table as native code reads it until `close`, if all of it is in DRAM and used there."""
        table = self._tables.get(layer)
        return None if table is None or layer in self._senders else table.whole

    def lookup(self, layer: int, rows: torch.Tensor) -> RowsTicket:
        """Request rows `[n]` int64 (repeats are fine) of a layer's table, delivered to the layer's device."""
        found = self._found(layer, rows)
        sender = self._senders.get(layer)
        return found if sender is None else sender.send(found, len(rows), self.files[layer].dim)

    def _found(self, layer: int, rows: torch.Tensor) -> ReadyRows | _ServedRows:
        """A lookup in host memory."""
        if self._server is None:
            self._telemetry.add("rows", "asked", len(rows))
            codes, scales = (part[rows] for part in self._on_disk[layer])
            found = self.files[layer].unpack(codes, scales)
            return ReadyRows(self._kernels.gather_rows(found, torch.arange(len(rows))))
        table = self._tables[layer]
        out = table.room(len(rows), pinned=layer in self._pinned)
        return _ServedRows(self._server.ask(self._numbers[layer], rows, out), table, self._telemetry)

    def close(self) -> None:
        """Stop the threads and close the files."""
        for sender in set(self._senders.values()):
            sender.close()
        if self._server is not None:
            self._server.close()
        self._direct.close()
