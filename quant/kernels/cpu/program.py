"""Programs: a decode step recorded as native operations on fixed addresses, and run by few calls.

The operations, weights and buffers of a step never change; what does (how many rows there are, their cache
slots and positions) stands in one small input. So a step is recorded once (quant/kernels/cpu/recorder.py),
and neither Python nor torch takes part in running it, except where a program hands over to its caller: bytes
must arrive first. Its operations are those of eager calls, so results are the same bits.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

# In the order of `Kind` in native_src/program.hpp.
KINDS = (
    "norm", "linear", "dense", "blocks", "turns", "rotate", "append", "attend", "gated", "add",
    "bias", "clip", "scale",
    "repeat", "weighted_sum", "mix", "mix_streams", "engram", "ring", "attend_sparse", "unless_complete",
    "pool", "entry", "select", "route", "at_hand", "experts", "part", "join",
    "convolve", "delta_rule", "gate", "embed", "ngrams", "table_rows", "by_token",
    "chain", "hand_over",
)  # fmt: skip
DENSE_KINDS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
ALIGNMENT = 64  # bytes

HandOver = Callable[[int], None]  # called with the number of rows

# Operations that take each row by itself, whatever other rows there are, and read no state of a sequence.
BY_ROW = frozenset((
    "norm", "turns", "rotate", "append", "gated", "add", "bias", "clip", "scale", "repeat", "weighted_sum",
    "mix", "mix_streams", "engram", "ring", "entry", "route", "part", "join", "gate", "embed", "by_token",
))  # fmt: skip
PRODUCTS = frozenset(("linear", "dense", "blocks"))
MOST_TOGETHER = 24  # operations of a run: their buffers share no places
# Products take each row by itself, too, but all threads then read all weights: of an operation, and of a
# program, so many bytes at most, which come from caches.
NEAR_BYTES, ALL_NEAR_BYTES = 256 * 1024, 8 * 1024 * 1024


class _Operation(ctypes.Structure):
    """`Operation` of native_src/program.hpp."""

    _fields_ = (
        ("kind", ctypes.c_int64),
        ("inputs", ctypes.c_void_p * 6),
        ("outputs", ctypes.c_void_p * 4),
        ("sizes", ctypes.c_int64 * 9),
        ("factor", ctypes.c_float),
        ("inputs_apart", ctypes.c_int64 * 6),
        ("outputs_apart", ctypes.c_int64 * 4),
        ("together", ctypes.c_int64),
    )


class _StepInput(ctypes.Structure):
    """`StepInput` of native_src/program.hpp."""

    _fields_ = (
        ("rows", ctypes.c_int64),
        ("slots", ctypes.c_void_p),
        ("positions", ctypes.c_void_p),
        ("tokens", ctypes.c_void_p),
    )


class Runner(Protocol):
    """Whoever has the threads, and knows the instruction set."""

    def run(self, operations: ctypes.Array[Any], first: int, step: ctypes.Structure) -> int:
        """Run operations from `first` on for a step; returns the number of the hand-over that they came to,
        or how many there are at the end."""
        ...


@dataclass(eq=False)
class Buffer:
    """`[rows, width]` of the arena, from the operation that writes it to the last that reads it.

    dtype  float32, or int64 for what is counted
    rows   that it has, if not one for each of the step's
    """

    width: int
    first: int
    last: int
    dtype: torch.dtype = torch.float32
    rows: int | None = None
    offset: int = 0  # bytes

    @property
    def apart(self) -> int:
        """Bytes from a row of the step to the next one; 0 where rows are something else."""
        return self.dtype.itemsize * self.width if self.rows is None else 0

    def nbytes(self, max_rows: int) -> int:
        """Bytes of the arena that it takes."""
        rows = max_rows if self.rows is None else self.rows
        return -(-self.dtype.itemsize * rows * self.width // ALIGNMENT) * ALIGNMENT


Operand = Buffer | int | None  # a buffer, or an address, or nothing


@dataclass
class Noted:
    """An operation as it was recorded.

    bytes_read  of weights, by a step with one row; what a program is described by
    """

    kind: str
    inputs: list[Operand]
    outputs: list[Operand]
    sizes: list[int]
    factor: float = 0.0
    bytes_read: int = 0
    layer: int | None = None


@dataclass
class Recording:
    """What a recorder has noted, before its buffers have places.

    held         what operations point to
    hand_overs   what is to be done at an operation, by its number
    """

    noted: list[Noted] = field(default_factory=list)
    buffers: list[Buffer] = field(default_factory=list)
    held: list[object] = field(default_factory=list)
    hand_overs: dict[int, HandOver] = field(default_factory=dict)

    def place(self, max_rows: int) -> int:
        """Give each buffer the lowest place that none holds while it lives; the bytes of all places.

        Operations of a run may be at different rows at the same time: none of its buffers shares a place with
        another one of the run.
        """
        begins: dict[int, int] = {}
        ends: dict[int, int] = {}
        for run in runs(self.noted):
            begins |= dict.fromkeys(run, run.start)
            ends |= dict.fromkeys(run, run.stop - 1)
        life = {
            id(buffer): (begins.get(buffer.first, buffer.first), ends.get(buffer.last, buffer.last))
            for buffer in self.buffers
        }
        placed: list[Buffer] = []
        for buffer in self.buffers:
            first, last = life[id(buffer)]
            alive = [other for other in placed if life[id(other)][1] >= first and life[id(other)][0] <= last]
            buffer.offset = 0
            for other in sorted(alive, key=lambda other: other.offset):
                if buffer.offset + buffer.nbytes(max_rows) <= other.offset:
                    break
                buffer.offset = max(buffer.offset, other.offset + other.nbytes(max_rows))
            placed.append(buffer)
        return max((buffer.offset + buffer.nbytes(max_rows) for buffer in placed), default=0)


def runs(noted: Sequence[Noted]) -> list[range]:
    """Operations in a row that take each row by itself: threads may share out rows and do all of them without
    waiting for one another."""
    small = [
        operation.bytes_read
        for operation in noted
        if operation.kind in PRODUCTS and operation.bytes_read <= NEAR_BYTES
    ]
    are_near = sum(small) <= ALL_NEAR_BYTES
    found: list[range] = []
    begin, breaks = 0, {len(noted)}
    for number, operation in enumerate(noted):
        is_near = operation.kind in PRODUCTS and operation.bytes_read <= NEAR_BYTES and are_near
        if operation.kind == "unless_complete":  # those that are skipped begin and end a run
            breaks.add(number + 1 + operation.sizes[1])
        is_by_row = operation.kind in BY_ROW or is_near
        if number in breaks or not is_by_row or number - begin == MOST_TOGETHER:
            found.append(range(begin, number))
            begin = number if is_by_row else number + 1
    found.append(range(begin, len(noted)))
    return [run for run in found if len(run) > 1]


class Program:
    """A recorded step. Used by one thread at a time.

    source  `[max_rows, width]`, to be filled before a run
    result  `[max_rows, width]`, valid until the next run
    nbytes  of the arena: buffers that live at different times share places
    hand_overs  what is to be done at an operation, by its number
    """

    def __init__(
        self, runner: Runner, recording: Recording, source: Buffer, result: Buffer, max_rows: int
    ) -> None:
        self._arena = torch.zeros(recording.place(max_rows) + ALIGNMENT, dtype=torch.uint8)
        self._begin = -(-self._arena.data_ptr() // ALIGNMENT) * ALIGNMENT - self._arena.data_ptr()
        self.max_rows = max_rows
        self.source = self.rows(source)
        self.result = self.rows(result)
        self.nbytes = self._arena.nbytes
        self.noted: Sequence[Noted] = recording.noted
        self._runner = runner
        self._held = recording.held
        self.hand_overs = recording.hand_overs
        self._operations = (_Operation * len(recording.noted))()
        for to, noted in zip(self._operations, recording.noted, strict=True):
            to.kind = KINDS.index(noted.kind)
            to.inputs[: len(noted.inputs)] = [self._address(place) for place in noted.inputs]
            to.outputs[: len(noted.outputs)] = [self._address(place) for place in noted.outputs]
            to.sizes[: len(noted.sizes)] = noted.sizes
            to.factor = noted.factor
            for apart, places in ((to.inputs_apart, noted.inputs), (to.outputs_apart, noted.outputs)):
                apart[: len(places)] = [p.apart if isinstance(p, Buffer) else 0 for p in places]
        for run in runs(recording.noted):
            self._operations[run.start].together = len(run)
        self._slots = (ctypes.c_int64 * max_rows)()
        self._positions = (ctypes.c_int64 * max_rows)()
        self._tokens = (ctypes.c_int64 * max_rows)()
        self._input = _StepInput(0, *map(ctypes.addressof, (self._slots, self._positions, self._tokens)))
        self._results = [self.result[:rows] for rows in range(max_rows + 1)]

    def rows(self, buffer: Buffer) -> torch.Tensor:
        """A buffer's rows, `[rows, width]`: valid while it lives."""
        rows = self.max_rows if buffer.rows is None else buffer.rows
        at = self._begin + buffer.offset
        nbytes = buffer.dtype.itemsize * rows * buffer.width
        return self._arena[at : at + nbytes].view(buffer.dtype).view(rows, buffer.width)

    def logits(self, rows: torch.Tensor | None, *, shared: bool = False) -> torch.Tensor:
        """Results of the last run, rows `[n]` int64 ascending or all of them: `[n, width]`. Shared, they need
        not be valid any longer than until the next run."""
        whole: torch.Tensor = self._results[self._input.rows]
        if rows is not None and len(rows) < len(whole):
            return self.result[rows]
        return whole if shared else whole.clone()

    def run(self, slots: Sequence[int], positions: Sequence[int], tokens: Sequence[int] = ()) -> None:
        """Compute `result` for as many rows as there are slots, from `source` and, where the program has
        operations that read them, `tokens`."""
        rows = len(slots)
        self._input.rows = rows
        self._slots[:rows] = list(slots)
        self._positions[:rows] = list(positions)
        self._tokens[: len(tokens)] = list(tokens)
        end = len(self._operations)
        at = self._runner.run(self._operations, 0, self._input)
        while at < end:
            with torch.inference_mode():
                self.hand_overs[at](rows)
            at = self._runner.run(self._operations, at + 1, self._input)

    def _address(self, place: Operand) -> int | None:
        if isinstance(place, Buffer):
            return self._arena.data_ptr() + self._begin + place.offset
        return place
