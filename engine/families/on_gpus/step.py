"""A decode step on several devices: one program for each stay on a device, run one after the other.

A step goes from device to device as layers do. Of a layer's experts each GPU computes those that it holds:
while a stay's program runs on one GPU, all others that hold experts run a program that serves it (`Helping`).
What no GPU holds is left to the processor. A family notes its operations with the recorder of the stay that
is being noted.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from engine.families.on_gpus.stays import GRACE_S, Helping, Stay, comes_to_an_end, helpers_of
from engine.program_report import StepPart
from memory.experts.coordinator import Coordinator, Round
from memory.experts.gpu_places import publish
from memory.experts.step import ExpertStep
from memory.experts.store import ExpertStore
from quant.errors import BudgetError
from quant.kernels.choice import recorder_on
from quant.kernels.cpu.program import Buffer
from quant.kernels.cuda.helper import comes_true, reached
from quant.kernels.cuda.mailbox import PAUSE_S, Mailbox, StalledError
from quant.kernels.cuda.recorder import GpuRecorder
from quant.kernels.cuda.step_experts import SlotsOnGpu
from quant.kernels.interface import NO_EXTRAS, ExpertExtras, Kernels
from quant.kernels.layers import RoutingRule
from quant.kernels.recording import StepRecorder

RecorderOn = Callable[[torch.device], StepRecorder]


@dataclass(frozen=True)
class StepExperts:
    """The routed experts of a step; layers are counted as the store counts them.

    limit   of the activation: see `MoeCall.swiglu_limit`
    layers, experts  how many layers there are, and experts of each
    """

    store: ExpertStore
    coordinator: Coordinator
    limit: float
    layers: int
    experts: int


def recorders_on(kernels: Kernels, max_rows: int) -> RecorderOn:
    """Makes recorders for devices that have one."""

    def on(device: torch.device) -> StepRecorder:
        recorder = recorder_on(device, kernels, max_rows)
        assert recorder is not None
        return recorder

    return on


def check_room(room: int, nbytes: Mapping[torch.device, int], rows: int, capacity: int) -> None:
    """Raises BudgetError where a recorded step's buffers need more than the `room` kept for them on each
    GPU."""
    for device in sorted(nbytes, key=str):
        if device.type != "cpu" and (missing := nbytes[device] - room) > 0:
            raise BudgetError(
                f"{device}: a recorded step of {rows} sequences of up to {capacity:,} tokens needs "
                f"{nbytes[device] / 1e6:,.1f} MB, {missing / 1e6:,.1f} MB more than was reserved for it; "
                "lower --max-model-len or leave this GPU out of --devices"
            )


class StepOnGpus:
    """The stays of a step, and the recorder of the one that is being noted.

    stays    in their order
    between  what torch does between two devices' programs, for so many rows
    slots, positions  of the step that runs
    """

    def __init__(self, recorder_on: RecorderOn, first: torch.device, experts: StepExperts | None) -> None:
        self.stay = Stay(recorder_on(first))
        self.stays = [self.stay]
        self.between: list[Callable[[int], None]] = []
        self.slots: list[int] = []
        self.positions: list[int] = []
        self._recorder_on = recorder_on
        self._experts = experts
        self._acquired: ExpertStep | None = None
        self._guess: tuple[int, Buffer] | None = None
        self._rounds: dict[int, tuple[Mailbox, list[int], torch.device]] = {}  # by the id of a recorder
        self._on_gpus = {} if experts is None else experts.store.on_gpus
        self._tables: dict[torch.device, torch.Tensor] = {}
        self._tiers = {str(device): places.tier for device, places in self._on_gpus.items()}
        self._busy: list[tuple[torch.device, Callable[[], bool]]] = []  # still, with a step that has failed

    # --------------------------------------------------------------------------------------- recording

    @property
    def recorder(self) -> StepRecorder:
        """Of the stay that is being noted."""
        return self.stay.recorder

    @property
    def device(self) -> torch.device:
        """Of the stay that is being noted."""
        return self.stay.recorder.device

    def recorder_on(self, device: torch.device) -> StepRecorder:
        """One more recorder, for a program beside those of stays."""
        return self._recorder_on(device)

    def begin(self, width: int) -> Buffer:
        """What the step begins with, `[rows, width]`."""
        self.stay.source = self.recorder.input(width)
        return self.stay.source

    def go_to(self, device: torch.device, values: Sequence[Buffer]) -> list[Buffer]:
        """Begin a stay on another device, which takes these values along."""
        origin, layer = self.stay, self.recorder.layer
        self.stay = Stay(self._recorder_on(device))
        self.stays.append(self.stay)
        self.recorder.layer = layer
        origin.result = values[0]
        return [self.stay.take(value, origin) for value in values]

    def finish(self, result: Buffer) -> None:
        """Make all programs, of which the last one's result is the step's."""
        self.stay.result = result
        for box, *_ in self._rounds.values():  # making programs runs them: nobody is to wait
            box.abandon()
        arenas = {
            device: torch.zeros(size, dtype=torch.uint8, device=device)
            for device, size in self._arenas().items()
        }
        for stay in self.stays:
            assert stay.source is not None
            given = stay.source, stay.result or stay.source
            if isinstance(stay.recorder, GpuRecorder):
                stay.program = stay.recorder.finish(*given, arenas[stay.recorder.device])
            else:
                stay.program = stay.recorder.finish(*given)
            for helping in stay.helping:
                helping.finish()
        if helpers_of(self.stays) and self.device.type == "cuda":
            # A kernel is loaded when it is first used, and that may wait for a GPU which waits for another.
            self.slots, self.positions = [0], [0]
            for work in self.between:
                work(1)

    def nbytes(self, result: Buffer) -> dict[torch.device, int]:
        """Bytes that the programs would hold, by device."""
        self.stay.result = result
        found: dict[torch.device, int] = defaultdict(int, self._arenas())
        for stay in self.stays:
            assert stay.source is not None
            if not isinstance(stay.recorder, GpuRecorder):
                found[stay.recorder.device] += stay.recorder.nbytes(stay.source, stay.result or stay.source)
            for helping in stay.helping:
                assert helping.x is not None
                found[helping.recorder.device] += helping.recorder.nbytes(helping.x, helping.x)
        return found

    def _arenas(self) -> dict[torch.device, int]:
        """Bytes of the buffers of each GPU's own stays, which share them: one runs after the other."""
        found: dict[torch.device, int] = {}
        for stay in self.stays:
            if isinstance(stay.recorder, GpuRecorder):
                assert stay.source is not None
                size = stay.recorder.nbytes(stay.source, stay.result or stay.source)
                found[stay.recorder.device] = max(size, found.get(stay.recorder.device, 0))
        return found

    def parts(self) -> list[StepPart]:
        """What each device does."""
        return [part for stay in self.stays for part in stay.parts()]

    # ----------------------------------------------------------------------------------------- experts

    def guess(self, layer: int, ids: Buffer) -> None:
        """What a layer will probably choose, for the layer before it, whose experts are noted next."""
        self._guess = layer, ids

    def route(
        self, layer: int, logits: Buffer, bias: torch.Tensor | None, rule: RoutingRule
    ) -> tuple[Buffer, Buffer]:
        """The chosen experts of a layer, whose experts are noted later, and their weights."""
        if not isinstance(self.recorder, GpuRecorder):
            return self.recorder.route(logits, bias, rule)
        slots = self._slots_here(layer)
        places = self._nowhere() if slots is None else slots.places[layer]
        return self.recorder.route(logits, bias, rule, places)

    def weigh(self, layer: int, logits: Buffer, ids: Buffer, rule: RoutingRule) -> Buffer:
        """The weights of experts of a layer that were chosen otherwise."""
        if not isinstance(self.recorder, GpuRecorder):
            return self.recorder.weigh(logits, ids, rule)
        slots = self._slots_here(layer)
        places = self._nowhere() if slots is None else slots.places[layer]
        return self.recorder.weigh(logits, ids, rule, places)

    def acquire(self, layer: int, ids: Buffer) -> None:
        """What is missing of a layer's experts is on its way from now on."""
        if isinstance(self.recorder, GpuRecorder):
            return  # they are found where they are computed
        here, experts = self.stay, self._experts
        assert experts is not None

        def work(rows: int) -> None:
            self._acquired = experts.store.acquire(layer, here.rows(ids, rows).cpu())

        self.recorder.hand_over(work, [ids], [])

    def run_experts(
        self, layer: int, x: Buffer, ids: Buffer, weights: Buffer, extras: ExpertExtras = NO_EXTRAS
    ) -> Buffer:
        """The weighted sum of the chosen experts' outputs, `[rows, hidden]`."""
        here, guess, experts = self.stay, self._guess, self._experts
        assert experts is not None
        store, limit = experts.store, experts.limit
        self._guess = None
        recorder = self.recorder
        if isinstance(recorder, GpuRecorder):
            slots = self._slots_here(layer)
            box, layers = self._round(recorder, x.width, ids.width)
            at = len(layers)
            layers.append(layer)
            for helping in here.helping:
                theirs = self._on_gpus[helping.recorder.device].slots(layer)
                helping.serve(theirs, layer, recorder.layer, (limit, extras), box, at)
            guesses = None if guess is None else guess[1]
            return recorder.experts(x, ids, weights, slots, (limit, extras), box, at, guesses)
        out = recorder.buffer(x.width)

        def work(rows: int) -> None:
            if guess is not None and store.wants_guesses(guess[0]):
                store.prefetch(guess[0], here.rows(guess[1], rows).t().flatten().cpu().tolist())
            assert self._acquired is not None
            with self._acquired as acquired:
                found = acquired.run(here.rows(x, rows), here.rows(weights, rows), limit, extras)
                here.rows(out, rows).copy_(found)
            self._acquired = None

        guessed = [] if guess is None else [guess[1]]
        recorder.hand_over(work, [x, ids, weights, *guessed], [out])
        return out

    def _slots_here(self, layer: int) -> SlotsOnGpu | None:
        """A layer's experts of the device that is noted, if it can find them by itself."""
        places = self._on_gpus.get(self.device)
        return None if places is None else places.slots(layer)

    def _nowhere(self) -> torch.Tensor:
        """A table of places on the device that is noted, which holds no experts: all are left to the
        processor."""
        if self.device not in self._tables:
            assert self._experts is not None
            nowhere = torch.full((self._experts.experts,), -1, dtype=torch.int64)
            self._tables[self.device] = nowhere.to(self.device)
        return self._tables[self.device]

    def _round(self, recorder: GpuRecorder, hidden: int, top_k: int) -> tuple[Mailbox, list[int]]:
        """The mailbox of a stay's program, and the layers of its hand-overs so far; begins what others do."""
        if id(recorder) not in self._rounds:
            assert self._experts is not None
            others = [device for device in self._on_gpus if device != recorder.device]
            if recorder.device not in self._on_gpus:
                others = []  # its table says of nothing where it is
            box = Mailbox(
                self._experts.layers, recorder.max_rows, top_k, hidden,
                pinned=recorder.device.type == "cuda", others=[str(device) for device in others],
            )  # fmt: skip
            self._rounds[id(recorder)] = box, [], recorder.device
            for answerer, device in enumerate(others, 1):
                helps = self._recorder_on(device)
                assert isinstance(helps, GpuRecorder)
                self.stay.helping.append(Helping(helps, answerer))
        box, layers, _ = self._rounds[id(recorder)]
        return box, layers

    # ----------------------------------------------------------------------------------------- running

    def run(self, embedded: torch.Tensor, slots: list[int], positions: list[int]) -> torch.Tensor:
        """The result `[rows, width]` in host memory, of `embedded` `[rows, hidden]`."""
        first, last = self.stays[0].program, self.stays[-1].program
        assert first is not None
        assert last is not None
        self.check()
        self.slots, self.positions = slots, positions
        first.source[: len(embedded)].copy_(embedded)
        self._begin_experts()
        try:
            for stay in self.stays:
                assert stay.program is not None
                for helper in helpers_of([stay]):
                    helper.start(len(embedded), self._fail_others)
                stay.program.run(slots, positions)
            if helpers_of(self.stays):
                self._wait_for_the_last()
            result = last.result[: len(embedded)].cpu()
            if self._experts is not None:
                self._experts.coordinator.end()
            for helper in helpers_of(self.stays):  # they have answered, and only have to come to their end
                if not comes_true(helper.is_done, GRACE_S):
                    raise StalledError(f"{helper.device} has not finished its part of a step")
        except BaseException:
            self._fail()
            raise
        self._end_experts()
        return result

    def check(self) -> None:
        """Before a step: raise StalledError while a GPU has not come to the end of one that has failed."""
        self._busy = [(device, is_done) for device, is_done in self._busy if not is_done()]
        if self._busy:
            raise StalledError(
                f"{self._busy[0][0]} has not come to the end of a step that has failed; if that lasts, "
                "restart the server"
            )

    def _begin_experts(self) -> None:
        if self._experts is None:
            return
        store = self._experts.store
        store.slots.settle()
        publish(list(self._on_gpus.values()))
        store.slots.gpus_rest = bool(self._rounds)
        self._experts.coordinator.begin([Round(box, layers) for box, layers, _ in self._rounds.values()])

    def _end_experts(self) -> None:
        """Tell the store what its GPUs have found by themselves; between steps, experts may move there."""
        if self._experts is None:
            return
        store = self._experts.store
        store.slots.gpus_rest = False
        for box, layers, device in self._rounds.values():
            for number, layer in enumerate(layers):
                needed, (elsewhere, *others) = box.chosen(number)
                names = box.answerers[1:]
                found = {self._tiers[name]: len(part) for name, part in zip(names, others, strict=True)}
                own = len(needed) - len(elsewhere) - sum(found.values())
                if own:
                    found[self._tiers[str(device)]] = own
                store.used_in_step(layer, needed, elsewhere, found)

    def _wait_for_the_last(self) -> None:
        """Until the last device is through. Where the step fails and a GPU hangs, raises StalledError."""
        assert self._experts is not None
        device, failed_at = self.stays[-1].recorder.device, None
        is_done = reached(device)
        while not is_done():
            if failed_at is None and self._experts.coordinator.has_failed:
                failed_at = time.monotonic()
            if failed_at is not None and time.monotonic() - failed_at > GRACE_S:
                raise StalledError(f"{device} has not finished a step that has failed")
            time.sleep(PAUSE_S)

    def _fail_others(self, error: BaseException) -> None:
        """A GPU that helps has failed, and so has the step."""
        assert self._experts is not None
        self._experts.coordinator.fail(error)

    def _fail(self) -> None:
        """Nothing stays claimed, and no GPU waits; those that do not come to an end are remembered."""
        if self._experts is not None:
            self._experts.coordinator.give_up()
            self._experts.store.slots.gpus_rest = False
        if self._acquired is not None:
            self._acquired.__exit__()
            self._acquired = None
        waits = [(helper.device, helper.is_done) for helper in helpers_of(self.stays)]
        waits += [(device, reached(device)) for device in {stay.recorder.device for stay in self.stays}]
        self._busy = [(device, is_done) for device, is_done in waits if not comes_to_an_end(is_done)]


class OnGpus:
    """What operations noted for the stays of `step` have in common, whatever the family."""

    step: StepOnGpus

    def check(self) -> None:
        """Before a step: see `StepOnGpus.check`."""
        self.step.check()

    def begin(self, width: int) -> Buffer:
        """What the step begins with, `[rows, width]`."""
        return self.step.begin(width)

    def finish(self, result: Buffer) -> None:
        """Make the programs, of which the last one's result is the step's."""
        self.step.finish(result)

    def nbytes(self, result: Buffer) -> dict[torch.device, int]:
        """Bytes that the programs would hold, by device."""
        return self.step.nbytes(result)

    def parts(self) -> list[StepPart]:
        """What each device does."""
        return self.step.parts()
