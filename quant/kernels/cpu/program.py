"""Programs: a decode step recorded as native operations on fixed addresses, and run by one call.

The operations, weights and buffers of a step never change; what does (how many rows there are, their cache
slots and positions) stands in one small input. So a step is recorded once, and neither Python nor torch takes
part in running it. Its operations are those of eager calls, so results are the same bits.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Protocol

import torch

from quant.errors import FormatError
from quant.kernels.cpu.panels import NativeWeight, native_weight
from quant.kernels.interface import Weight

# In the order of `Kind` in native_src/program.hpp.
KINDS = ("norm", "linear", "dense", "rotate", "append", "attend", "gated", "add", "scale")
DENSE_KINDS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
GROUP = 3  # matrices of one operation at most
ALIGNMENT = 64  # bytes


class _Operation(ctypes.Structure):
    """`Operation` of native_src/program.hpp."""

    _fields_ = (
        ("kind", ctypes.c_int64),
        ("inputs", ctypes.c_void_p * 3),
        ("outputs", ctypes.c_void_p * 3),
        ("sizes", ctypes.c_int64 * 5),
        ("factor", ctypes.c_float),
    )


class _StepInput(ctypes.Structure):
    """`StepInput` of native_src/program.hpp."""

    _fields_ = (("rows", ctypes.c_int64), ("slots", ctypes.c_void_p), ("positions", ctypes.c_void_p))


class Runner(Protocol):
    """Whoever has the threads, and knows the instruction set."""

    def run(self, operations: ctypes.Array[Any], step: ctypes.Structure) -> None:
        """Run operations for a step."""
        ...


@dataclass(frozen=True)
class KvPlace:
    """Where a layer's keys and values lie: row `position` of head h of a slot, strides in floats.

    keys, values `[slots, kv_heads, capacity, head_dim]` float32, perhaps views of something larger.
    """

    keys: torch.Tensor
    values: torch.Tensor

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """kv_heads, head_dim, and the strides of a head and of a slot."""
        slot, head, _, _ = self.keys.stride()
        return self.keys.shape[1], self.keys.shape[3], head, slot


@dataclass(eq=False)
class Buffer:
    """`[rows, width]` float32 of the arena, from the operation that writes it to the last that reads it."""

    width: int
    first: int
    last: int
    offset: int = 0  # bytes


@dataclass
class _Noted:
    kind: str
    inputs: list[Buffer | int]
    outputs: list[Buffer | int]
    sizes: Sequence[int]
    factor: float = 0.0


@dataclass
class Recorder:
    """Notes operations in the order of their calls; `finish` makes a program of them.

    max_rows  that a step may have
    """

    runner: Runner
    max_rows: int
    _noted: list[_Noted] = field(default_factory=list)
    _buffers: list[Buffer] = field(default_factory=list)
    _held: list[object] = field(default_factory=list)  # what operations point to

    def input(self, width: int) -> Buffer:
        """A buffer that is filled before each run."""
        return self._buffer(width)

    def norm(self, x: Buffer, weight: torch.Tensor, eps: float) -> Buffer:
        """x * rsqrt(mean(x^2) + eps) * weight."""
        out = self._buffer(x.width)
        self._note("norm", [x, self._address(weight)], [out], [x.width], eps)
        return out

    def linears(self, x: Buffer, weights: Sequence[Weight]) -> list[Buffer]:
        """`x @ weight^T` for each weight. Raises FormatError for a format without a kernel."""
        outs = [self._buffer(int(weight.shape[0])) for weight in weights]
        prepared = [self._prepared(weight) for weight in weights]
        pairs = list(zip(prepared, outs, strict=True))
        for kind, group in groupby(pairs, key=lambda pair: self._group(pair[0])):
            members = list(group)
            if kind is None:
                for dense, out in members:
                    assert isinstance(dense, torch.Tensor)
                    rows, cols = dense.shape
                    self._note(
                        "dense", [x, self._address(dense)], [out], [DENSE_KINDS[dense.dtype], rows, cols]
                    )
                continue
            for at in range(0, len(members), GROUP):
                self._linear(x, members[at : at + GROUP])
        return outs

    def rotate(self, x: Buffer, turns: torch.Tensor, heads: int) -> Buffer:
        """The last channels of each head turned by the row of turns `[positions, pairs]` at its position."""
        out = self._buffer(x.width)
        sizes = [heads, x.width // heads, turns.shape[1]]
        self._note("rotate", [x, self._address(turns)], [out], sizes)
        return out

    def append(self, keys: Buffer, values: Buffer, place: KvPlace) -> None:
        """Write keys and values to the cache, each row at its slot and position."""
        self._held.append(place)
        self._note("append", [keys, values], [place.keys.data_ptr(), place.values.data_ptr()], place.sizes)

    def attend(self, q: Buffer, place: KvPlace) -> Buffer:
        """Attention of each row over what its slot holds up to its position."""
        kv_heads, dim, head, slot = place.sizes
        out = self._buffer(q.width)
        self._held.append(place)
        inputs: list[Buffer | int] = [q, place.keys.data_ptr(), place.values.data_ptr()]
        self._note("attend", inputs, [out], [q.width // dim, kv_heads, dim, head, slot])
        return out

    def gated(self, gate: Buffer, up: Buffer, limit: float) -> Buffer:
        """silu(min(gate, limit)) * clamp(up, -limit, limit)."""
        out = self._buffer(gate.width)
        self._note("gated", [gate, up], [out], [gate.width], limit)
        return out

    def add(self, x: Buffer, y: Buffer) -> Buffer:
        """x + y."""
        out = self._buffer(x.width)
        self._note("add", [x, y], [out], [x.width])
        return out

    def scale(self, x: Buffer, factor: float) -> Buffer:
        """x * factor."""
        out = self._buffer(x.width)
        self._note("scale", [x], [out], [x.width], factor)
        return out

    def finish(self, source: Buffer, result: Buffer) -> Program:
        """The program of what was noted, from `source`, filled before each run, to `result`."""
        source.first, result.last = -1, len(self._noted)
        arena = torch.zeros(self._place() + ALIGNMENT, dtype=torch.uint8)
        begin = -(-arena.data_ptr() // ALIGNMENT) * ALIGNMENT - arena.data_ptr()

        def address(place: Buffer | int) -> int:
            return place if isinstance(place, int) else arena.data_ptr() + begin + place.offset

        def rows(of: Buffer) -> torch.Tensor:
            at = begin + of.offset
            return (
                arena[at : at + self._nbytes(of)]
                .view(torch.float32)[: self.max_rows * of.width]
                .view(self.max_rows, of.width)
            )

        operations = (_Operation * len(self._noted))()
        for to, noted in zip(operations, self._noted, strict=True):
            to.kind = KINDS.index(noted.kind)
            to.inputs[: len(noted.inputs)] = [address(place) for place in noted.inputs]
            to.outputs[: len(noted.outputs)] = [address(place) for place in noted.outputs]
            to.sizes[: len(noted.sizes)] = list(noted.sizes)
            to.factor = noted.factor
        return Program(
            self.runner, operations, rows(source), rows(result), arena.nbytes, [arena, *self._held]
        )

    def _buffer(self, width: int) -> Buffer:
        buffer = Buffer(width, len(self._noted), len(self._noted))
        self._buffers.append(buffer)
        return buffer

    def _note(
        self,
        kind: str,
        inputs: Sequence[Buffer | int],
        outputs: Sequence[Buffer | int],
        sizes: Sequence[int],
        factor: float = 0.0,
    ) -> None:
        for place in (*inputs, *outputs):
            if isinstance(place, Buffer):
                place.last = len(self._noted)
        self._noted.append(_Noted(kind, list(inputs), list(outputs), sizes, factor))

    def _linear(self, x: Buffer, members: Sequence[tuple[NativeWeight | torch.Tensor, Buffer]]) -> None:
        """Packed matrices of one format, multiplied with the same x together."""
        weights = [weight for weight, _ in members if isinstance(weight, NativeWeight)]
        matrices = (ctypes.c_void_p * len(weights))(*(weight.address for weight in weights))
        self._held += [matrices, *weights]
        self._note("linear", [x, ctypes.addressof(matrices)], [out for _, out in members], [len(weights)])

    def _prepared(self, weight: Weight) -> NativeWeight | torch.Tensor:
        if isinstance(weight, torch.Tensor):
            return weight.contiguous()
        native = native_weight(weight)
        if native is None:
            raise FormatError(f"{weight.format.name}: no kernel multiplies with it")
        return native

    def _group(self, weight: NativeWeight | torch.Tensor) -> str | None:
        """What weights must share to be multiplied together; None where each is alone."""
        return None if isinstance(weight, torch.Tensor) else weight.format.name

    def _address(self, tensor: torch.Tensor) -> int:
        tensor = tensor.contiguous()
        self._held.append(tensor)
        return tensor.data_ptr()

    def _nbytes(self, buffer: Buffer) -> int:
        return -(-4 * self.max_rows * buffer.width // ALIGNMENT) * ALIGNMENT

    def _place(self) -> int:
        """Give each buffer the lowest place that none holds while it lives; the bytes of all places."""
        placed: list[Buffer] = []
        for buffer in self._buffers:
            alive = [other for other in placed if other.last >= buffer.first and other.first <= buffer.last]
            buffer.offset = 0
            for other in sorted(alive, key=lambda other: other.offset):
                if buffer.offset + self._nbytes(buffer) <= other.offset:
                    break
                buffer.offset = max(buffer.offset, other.offset + self._nbytes(other))
            placed.append(buffer)
        return max((buffer.offset + self._nbytes(buffer) for buffer in placed), default=0)


class Program:
    """A recorded step. Used by one thread at a time.

    source  `[max_rows, width]`, to be filled before a run
    result  `[max_rows, width]`, valid until the next run
    nbytes  of the arena: buffers that live at different times share places
    """

    def __init__(
        self,
        runner: Runner,
        operations: ctypes.Array[_Operation],
        source: torch.Tensor,
        result: torch.Tensor,
        nbytes: int,
        held: list[object],
    ) -> None:
        self.source = source
        self.result = result
        self.nbytes = nbytes
        self._runner = runner
        self._operations = operations
        self._held = held
        self._slots = (ctypes.c_int64 * len(source))()
        self._positions = (ctypes.c_int64 * len(source))()
        self._input = _StepInput(0, ctypes.addressof(self._slots), ctypes.addressof(self._positions))

    @property
    def max_rows(self) -> int:
        """Rows that a run may have."""
        return len(self.source)

    def run(self, slots: Sequence[int], positions: Sequence[int]) -> None:
        """Compute `result` from `source` for as many rows as there are slots."""
        rows = len(slots)
        self._input.rows = rows
        self._slots[:rows] = list(slots)
        self._positions[:rows] = list(positions)
        self._runner.run(self._operations, self._input)
