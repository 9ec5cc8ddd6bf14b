"""What a recorder notes: operations in order, buffers while they live, and what must stay where it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from quant.errors import FormatError
from quant.kernels.cpu.panels import NativeWeight, native_weight
from quant.kernels.cpu.program import ALIGNMENT, Buffer, HandOver, Noted, Operand, Program, Recording, Runner
from quant.kernels.interface import Weight


@dataclass
class Notes:
    """What was noted of a step, and where it lies. Buffers are `[rows, width]`.

    max_rows  that a step may have
    layer     of which operations are noted; for descriptions only
    """

    runner: Runner
    max_rows: int
    layer: int | None = None
    _recording: Recording = field(default_factory=Recording)
    _kept: list[Buffer] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        """Where its programs run."""
        return torch.device("cpu")

    def keep(self, buffer: Buffer) -> None:
        """Keep a buffer's values until the next run."""
        self._kept.append(buffer)

    def input(self, width: int, dtype: torch.dtype = torch.float32) -> Buffer:
        """A buffer that is filled before each run."""
        buffer = self.buffer(width, dtype)
        buffer.first = -1
        return buffer

    def buffer(self, width: int, dtype: torch.dtype = torch.float32, rows: int | None = None) -> Buffer:
        """A buffer for what the next operation writes, which may be a hand-over."""
        at = len(self._recording.noted)
        buffer = Buffer(width, at, at, dtype, rows)
        self._recording.buffers.append(buffer)
        return buffer

    def hand_over(
        self,
        work: HandOver,
        reads: Sequence[Buffer],
        writes: Sequence[Buffer],
        skip: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """A place where a run comes back to its caller, who does `work` on some buffers.

        Returns a number `[1]` int64, `skip` where given, else a new one that is 0: a run goes on without
        `work` while it is not 0.
        """
        skip = torch.zeros(1, dtype=torch.int64) if skip is None else skip
        at = len(self._recording.noted)
        self._recording.hand_overs[at] = work
        self._note("hand_over", [self._address(skip)], [], [])
        for buffer in (*reads, *writes):
            buffer.last = at
        return skip

    def finish(self, source: Buffer, result: Buffer) -> Program:
        """The program of what was noted, from `source`, filled before each run, to `result`."""
        self._end(source, result)
        return Program(self.runner, self._recording, source, result, self.max_rows)

    def nbytes(self, source: Buffer, result: Buffer) -> int:
        """Bytes that this program would hold."""
        self._end(source, result)
        return self._recording.place(self.max_rows) + ALIGNMENT

    def _end(self, source: Buffer, result: Buffer) -> None:
        """Let what is read behind the last operation live until then."""
        source.first = -1
        for buffer in (result, *self._kept):
            buffer.last = len(self._recording.noted)

    def _note(
        self,
        kind: str,
        inputs: Sequence[Operand],
        outputs: Sequence[Operand],
        sizes: Sequence[int],
        factor: float = 0.0,
        nbytes: int = 0,
    ) -> None:
        noted = self._recording.noted
        for place in (*inputs, *outputs):
            if isinstance(place, Buffer):
                place.last = len(noted)
        noted.append(Noted(kind, list(inputs), list(outputs), list(sizes), factor, nbytes, self.layer))

    def _native(self, weight: Weight) -> NativeWeight:
        if isinstance(weight, torch.Tensor):
            raise FormatError("plain weights have no panels")
        native = native_weight(weight)
        if native is None:
            raise FormatError(f"{weight.format.name}: no kernel multiplies with it")
        return native

    def _weight(self, weight: torch.Tensor) -> int:
        """Where a weight's values lie, one behind the other."""
        return self._address(weight.contiguous())

    def _address(self, tensor: torch.Tensor) -> int:
        """Where a tensor lies, which is kept; a view of a cache may have larger steps between slots."""
        self._recording.held.append(tensor)
        return tensor.data_ptr()
