"""Programs for a GPU: a decode step recorded as kernel launches on fixed addresses.

What changes from step to step is one small tensor on the GPU, filled by one copy: how many rows there are,
their cache slots and positions. Launches are made for 1, 2, 4, 8 or 16 rows; rows that are not alive are
computed and stored nowhere. On a CUDA device the launches between two places where a run comes back to its
caller are captured as a graph, once for each number of rows, and a run starts that; elsewhere they are
started one after the other, which is what a graph does, too.
"""

from __future__ import annotations

import gc
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache

import torch

from quant.kernels.cpu.program import Buffer, Recording
from quant.kernels.cuda.chains import Fixed, Noted
from quant.kernels.cuda.kernels import TritonKernels
from quant.kernels.cuda.launch import Launch, Launcher
from quant.kernels.cuda.lowering import Places
from quant.kernels.cuda.mailbox import Word, has_stream_words
from quant.kernels.cuda.noted import fused
from quant.kernels.cuda.schedule import LAUNCHES, give_lives, scheduled

logger = logging.getLogger("loci.kernels")


class GpuProgram:
    """A recorded step on one GPU. Used by one thread at a time.

    source  `[max_rows, width]`, to be filled before a run
    result  `[max_rows, width]`, valid until the next run
    nbytes  of the GPU's memory that it uses: buffers that live at different times share places
    arena   bytes for its buffers, which programs that never run at the same time may share; None for its own
    """

    def __init__(
        self,
        kernels: TritonKernels,
        noted: Sequence[Noted],
        inputs: Sequence[Buffer],
        source: Buffer,
        result: Buffer,
        max_rows: int,
        arena: torch.Tensor | None = None,
    ) -> None:
        self._groups, size = arranged(noted, [*inputs, source, result], max_rows)
        device = kernels.device
        arena = torch.zeros(size, dtype=torch.uint8, device=device) if arena is None else arena[:size]
        self._host_step = torch.zeros(1 + 2 * max_rows, dtype=torch.int64)
        if device.type == "cuda":
            self._host_step = self._host_step.pin_memory()
        self._places = Places(arena, self._host_step.to(device), max_rows)
        self.device = device
        self.max_rows = max_rows
        self.source, self.result = self.rows(source), self.rows(result)
        self._launcher = kernels.launcher
        self._counts: Counter[int | None] = Counter()  # launches, by layer
        self._parts = {rows: self._segments(rows) for rows in row_counts(max_rows)}
        tables = [_table_bytes(step) for segment in self._all_segments() for step in segment.steps]
        self.nbytes = arena.nbytes + self._host_step.nbytes + sum(tables)
        if device.type == "cuda":
            problems = {segment.capture() for segment in self._all_segments()} - {""}
            if problems:
                logger.warning(
                    "%s: decode steps cannot be captured as CUDA graphs (%s); their kernels are started one "
                    "by one, which is slower", device, "; ".join(sorted(problems)),
                )  # fmt: skip

    def rows(self, buffer: Buffer) -> torch.Tensor:
        """A buffer's rows, `[rows, width]`, on the GPU: valid while it lives."""
        return self._places.rows(buffer)

    def run(self, slots: Sequence[int], positions: Sequence[int]) -> None:
        """Compute `result` from `source` for as many rows as there are slots; returns before the GPU has."""
        rows, step = len(slots), self._host_step
        step[0] = rows
        step[1 : 1 + rows] = torch.tensor(slots)
        step[1 + self.max_rows : 1 + self.max_rows + rows] = torch.tensor(positions)
        self._places.step.copy_(step, non_blocking=True)
        self.start(rows)

    def start(self, rows: int) -> None:
        """The same with the slots and positions of the last run, or of a program that has neither."""
        for part in self._parts[next(count for count in self._parts if count >= rows)]:
            if isinstance(part, Segment):
                part.run()
            elif isinstance(part, Word):
                part.on_host(self.device)
            elif part.skip is None or int(part.skip) == 0:
                assert part.work is not None
                part.work(rows)

    @property
    def is_captured(self) -> bool:
        """Whether all launches are in graphs."""
        return all(segment.is_captured for segment in self._all_segments())

    @property
    def runs_alone(self) -> bool:
        """Whether a run only starts launches, and never waits or comes back to its caller."""
        return all(isinstance(part, Segment) for parts in self._parts.values() for part in parts)

    def launches(self, layer: int | None) -> int:
        """Kernels that a step launches for a layer; what several layers share counts for the one that waits
        for it."""
        return self._counts[layer]

    def hand_overs(self, layer: int | None) -> int:
        """Places in a layer where a run comes back to its caller."""
        ops = [op for group in self._groups for op in group if op.layer == layer]
        return sum(op.kind == "hand_over" or op.is_mailed for op in ops)

    def exchanges(self, layer: int | None) -> int:
        """Answers of other GPUs that a layer waits for."""
        ops = [op for group in self._groups for op in group if op.layer == layer]
        return sum(len(op.words) - 1 for op in ops if op.kind == "await")

    @property
    def layers(self) -> list[int | None]:
        """Those that have operations here, in their order."""
        return list(dict.fromkeys(op.layer for group in self._groups for op in group))

    def _segments(self, rows: int) -> list[Segment | Noted | Word]:
        """A step of so many rows: launches, and hand-overs between them."""
        parts: list[Segment | Noted | Word] = []
        self._counts.clear()
        for group in self._groups:
            op = group[0]
            if op.kind == "hand_over":
                parts.append(op)
                continue
            launches = self._places.launches(group, rows) if LAUNCHES.get(op.kind, 1) else []
            self._counts[op.layer] += len(launches)
            steps: list[Launch | Word] = [*launches]
            words = [word for op in group for word in op.words]
            by_stream = words != [] and has_stream_words(self.device)
            if by_stream:
                steps += words
            if steps and not (parts and isinstance(parts[-1], Segment)):
                parts.append(Segment(self._launcher, self.device))
            if steps:
                segment = parts[-1]
                assert isinstance(segment, Segment)
                segment.steps += steps
            if not by_stream:
                parts += words
        return parts

    def _all_segments(self) -> list[Segment]:
        return [part for parts in self._parts.values() for part in parts if isinstance(part, Segment)]


class Segment:
    """Launches without a place to come back between them."""

    def __init__(self, launcher: Launcher, device: torch.device) -> None:
        self.steps: list[Launch | Word] = []
        self._launcher = launcher
        self._device = device
        self._graph: torch.cuda.CUDAGraph | None = None

    @property
    def is_captured(self) -> bool:
        """Whether they are in a graph."""
        return self._graph is not None

    def run(self) -> None:
        """Start all launches."""
        if self._graph is not None:
            self._graph.replay()
            return
        # A default stream's handle is 0 on every device: the driver takes that of the current one.
        with torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext():
            self._start()

    def capture(self) -> str:
        """Make a graph of a CUDA device's launches, or say why not. Runs them before, so that kernels are
        compiled and loaded: no row may be alive, and no value may be waiting in a buffer."""
        with torch.cuda.device(self._device):
            self._start()
            graph = torch.cuda.CUDAGraph()
            try:
                # Without a stream of its own it would be captured on the device that was first of all. What
                # other threads do meanwhile, copies of experts say, does not break a capture of this thread.
                stream = _capture_stream(self._device)
                with (
                    _collecting_nothing(),
                    torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"),
                ):
                    self._start()
            except RuntimeError as error:
                return str(error)
        self._graph = graph
        return ""

    def _start(self) -> None:
        for step in self.steps:
            if isinstance(step, Word):
                step.on_stream(self._device)
            else:
                self._launcher.start(step)


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all programs: torch has 32 streams a device, and those who need one of their own share them."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


@contextmanager
def _collecting_nothing() -> Iterator[None]:
    """Python frees no cycles in the block: CUDA objects among them would break a capture."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def arranged(noted: Sequence[Noted], kept: Sequence[Buffer], max_rows: int) -> tuple[list[list[Noted]], int]:
    """Operations in groups that are launched together, and the bytes of the buffers, which now have
    places."""
    groups = scheduled(fused(noted, kept))
    buffers = [buffer for buffer in give_lives(groups, kept) if not isinstance(buffer, Fixed)]
    return groups, Recording(buffers=buffers).place(max_rows)


def row_counts(max_rows: int) -> list[int]:
    """The numbers of rows that there are launches for, ascending."""
    counts = [1 << bit for bit in range(max_rows.bit_length()) if 1 << bit < max_rows]
    return [*counts, max_rows]


def _table_bytes(launch: Launch | Word) -> int:
    """Bytes of the table that a launch has made for itself."""
    if isinstance(launch, Word):
        return 0
    is_table = launch.kernel.fn.__name__ in ("products", "row_tasks")
    first = launch.arguments[0]
    return first.nbytes if is_table and isinstance(first, torch.Tensor) else 0
