"""Operations on parallel streams, noted by a recorder; each row is one sequence's newest token."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from engine.families.streams.config import StreamConfig
from engine.families.streams.operations import Frequencies, StreamMix
from engine.layers.hyper_connections import HyperConnection
from engine.layers.recorded import RecordedBasics
from quant.kernels.cpu.program import Buffer, Program
from quant.kernels.cpu.recorder import Recorder
from quant.kernels.interface import Weight
from quant.kernels.recording import StepRecorder


class StreamNotes(RecordedBasics):
    """`StreamOperations` as far as they are the same on all devices."""

    _config: StreamConfig

    def __init__(self, recorder: StepRecorder, frequencies: Frequencies) -> None:
        super().__init__(recorder)
        self._frequencies = frequencies
        self._turns: dict[tuple[bool, bool, int], Buffer] = {}  # by compressed, backwards, unit
        self.captured: list[Buffer] = []  # what is captured, side by side

    def at_layer(self, number: int | None) -> None:
        self._recorder.layer = number

    def trace(self, name: str, value: Buffer, *shape: int) -> None:
        """Nothing is kept: a step that is traced is not replayed."""

    def mix(self, connection: HyperConnection, streams: Buffer) -> StreamMix[Buffer]:
        c = connection
        mix = self._recorder.mix(streams, c.fn, c.scale, c.base, c.sinkhorn_iters, c.hc_eps, c.norm_eps)
        return StreamMix(*mix)

    def read_streams(self, streams: Buffer, pre: Buffer) -> Buffer:
        return self._recorder.weighted_sum(streams, pre)

    def write_streams(self, streams: Buffer, y: Buffer, mix: StreamMix[Buffer]) -> Buffer:
        return self._recorder.mix_streams(streams, y, mix.post, mix.combine)

    def capture(self, streams: Buffer) -> None:
        assert isinstance(self._recorder, Recorder)  # nothing is captured on GPUs
        hc = self._config.hc_mult
        mean = self._recorder.weighted_sum(streams, self._recorder.constant(torch.full((hc,), 1 / hc)))
        self._recorder.keep(mean)
        self.captured.append(mean)

    def _captured_rows(self, program: Program, rows: int) -> torch.Tensor:
        """What a program's last run has captured of so many rows; valid until the next one."""
        parts = [program.rows(part)[:rows] for part in self.captured]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def rotate(self, x: Buffer, heads: int, *, compressed: bool, backwards: bool = False) -> Buffer:
        return self._recorder.rotate(x, self._turn(compressed, backwards), heads)

    def by_rows(self, work: Callable[[Buffer], Buffer], x: Buffer) -> Buffer:
        return work(x)

    def each_rows(self, work: Callable[[Buffer], None], x: Buffer) -> None:
        work(x)

    def blocks(self, x: Buffer, weights: Sequence[Weight]) -> Buffer:
        return self._recorder.blocks(x, weights)

    def _turn(self, compressed: bool, backwards: bool, unit: int = 1) -> Buffer:
        """Rotations of the rows' positions, or of their groups' first ones; computed once a step."""
        key = compressed, backwards, unit
        if key not in self._turns:
            by = self._frequencies.of(compressed=compressed)
            self._turns[key] = self._recorder.turns(by, unit=unit, backwards=backwards)
        return self._turns[key]
