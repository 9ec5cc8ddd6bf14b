"""Parts of a recorded step, each on one device, and what other GPUs do for them meanwhile."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from engine.program_report import LayerWork, StepPart
from quant.kernels.cpu.program import Buffer, Program
from quant.kernels.cuda.helper import Helper, comes_true
from quant.kernels.cuda.mailbox import Mailbox
from quant.kernels.cuda.program import GpuProgram
from quant.kernels.cuda.recorder import GpuRecorder
from quant.kernels.cuda.step_experts import SlotsOnGpu
from quant.kernels.interface import ExpertExtras
from quant.kernels.recording import StepProgram, StepRecorder

GRACE_S = 10.0  # for a GPU to come to the end of a step in which nobody waits any more


@dataclass
class Helping:
    """A GPU's part in a stay on another one: the experts of its layers that this GPU holds.

    answerer  its number in the other's mailbox
    x         what its program brings here first
    """

    recorder: GpuRecorder
    answerer: int
    x: Buffer | None = None
    helper: Helper | None = None

    def serve(
        self,
        slots: SlotsOnGpu,
        layer: int,
        name: int | None,
        activation: tuple[float, ExpertExtras],
        box: Mailbox,
        number: int,
    ) -> None:
        """Note the hand-over of a layer, which the model calls `name`."""
        self.recorder.layer = name
        x = self.recorder.serve(slots, slots.places[layer], activation, box, number, self.answerer)
        self.x = self.x or x

    def finish(self) -> None:
        """Make the program."""
        assert self.x is not None
        self.helper = Helper(self.recorder.finish(self.x, self.x))


@dataclass
class Stay:
    """A part of a step on one device, and its program once it is made.

    source, result  of the program
    helping         what other GPUs do for it
    """

    recorder: StepRecorder
    source: Buffer | None = None
    result: Buffer | None = None
    program: StepProgram | None = None
    helping: list[Helping] = field(default_factory=list)

    def take(self, value: Buffer, origin: Stay) -> Buffer:
        """A value of another stay, from now on here."""
        to = self.recorder.input(value.width, value.dtype)
        origin.recorder.hand_over(lambda rows: self._copy(to, origin, value, rows), [value], [])
        self.source = self.source or to
        return to

    def parts(self) -> list[StepPart]:
        """What its device does, and what others do for it, layer by layer."""
        found = [StepPart(str(self.recorder.device), None, _work(self.program))]
        for helping in self.helping:
            assert helping.helper is not None
            work = _work(helping.helper.program)
            found.append(StepPart(str(helping.recorder.device), str(self.recorder.device), work))
        return found

    def rows(self, buffer: Buffer, rows: int) -> torch.Tensor:
        """The rows of a buffer that are alive, on its device."""
        assert self.program is not None
        return self.program.rows(buffer)[:rows]

    def _copy(self, to: Buffer, origin: Stay, value: Buffer, rows: int) -> None:
        self.rows(to, rows).copy_(origin.rows(value, rows))


def _work(program: StepProgram | None) -> tuple[LayerWork, ...]:
    if isinstance(program, GpuProgram):
        counts = program.launches, program.hand_overs, program.exchanges
        return tuple(LayerWork(layer, *(count(layer) for count in counts)) for layer in program.layers)
    assert isinstance(program, Program)
    hand_overs = Counter(noted.layer for noted in program.noted if noted.kind == "hand_over")
    layers = dict.fromkeys(noted.layer for noted in program.noted)
    return tuple(LayerWork(layer, None, hand_overs[layer]) for layer in layers)


def helpers_of(stays: Sequence[Stay]) -> list[Helper]:
    """Of all these, once their programs are made."""
    return [h.helper for stay in stays for h in stay.helping if h.helper is not None]


def comes_to_an_end(is_done: Callable[[], bool]) -> bool:
    """Whether a GPU comes to the end of a failed step; not where the GPU itself has failed."""
    try:
        return comes_true(is_done, GRACE_S)
    except RuntimeError:
        return False
