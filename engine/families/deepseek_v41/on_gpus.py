"""V4.1's operations noted for several devices: one program for each stay on a device, run one after the
other.

A step goes from device to device as layers do, and takes along what later layers need. Compressed entries
stay with the layer that made them: where another device asks for some, queries travel to their index keys,
and the chosen entries come back to a copy of their own, once for all layers that share the choice.

Of a layer's experts each GPU computes those that it holds: while a stay's program runs on one GPU, all others
that hold experts run a program that serves it (`Helping`).
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch

from engine.cache.sparse import SparseCache
from engine.families.base import Batch
from engine.families.deepseek_v41.notes import V41Notes
from engine.families.deepseek_v41.operations import V41Parts
from engine.families.deepseek_v41.stays import GRACE_S, Helping, Stay, comes_to_an_end, helpers_of
from engine.families.streams.operations import Written
from engine.families.streams.weights import StreamAttention
from engine.layers.engram_lookup import StepRows
from engine.program_report import StepPart
from memory.experts.coordinator import Coordinator, Round
from memory.experts.gpu_places import publish
from memory.experts.step import ExpertStep
from quant.formats.rows import Rows, bytes_of, like
from quant.kernels.cpu.cache_notes import Selector
from quant.kernels.cpu.program import Buffer
from quant.kernels.cuda.helper import comes_true, reached
from quant.kernels.cuda.mailbox import PAUSE_S, Mailbox, StalledError
from quant.kernels.cuda.recorder import GpuRecorder
from quant.kernels.cuda.step_experts import SlotsOnGpu
from quant.kernels.layers import RoutingRule
from quant.kernels.recording import StepRecorder

RecorderOn = Callable[[torch.device], StepRecorder]


class V41OnGpus(V41Notes):
    """`V41Operations` noted by a recorder for each device, for steps with `cache`."""

    def __init__(
        self,
        parts: V41Parts,
        recorder_on: RecorderOn,
        cache: SparseCache,
        first: torch.device,
        coordinator: Coordinator,
    ) -> None:
        super().__init__(parts, recorder_on(first), cache)
        self._recorder_on = recorder_on
        self._stay = Stay(self._recorder)
        self.stays = [self._stay]
        self._layer: int | None = None
        self._copies: dict[tuple[int, torch.device], torch.Tensor] = {}  # of chosen entries, by source
        self._copied: Buffer | None = None  # which of them are chosen
        self._slots: list[int] = []
        self._positions: list[int] = []
        self._step_rows: StepRows | None = None
        self._acquired: ExpertStep | None = None
        self._guess: tuple[int, Buffer] | None = None
        self._kv: dict[int, Buffer] = {}  # of table rows, by layer
        self._coordinator = coordinator
        self._rounds: dict[int, tuple[Mailbox, list[int]]] = {}  # by the id of a stay's recorder
        self._on_gpus = parts.weights.experts.on_gpus
        self._tiers = {str(device): places.tier for device, places in self._on_gpus.items()}
        self._between: list[Callable[[int], None]] = []  # what torch does between two devices' programs
        self._busy: list[tuple[torch.device, Callable[[], bool]]] = []  # still, with a step that has failed

    # ------------------------------------------------------------------------------------------- running

    def run(self, batch: Batch, embedded: torch.Tensor, rows: StepRows | None) -> torch.Tensor:
        first, last = self.stays[0].program, self.stays[-1].program
        assert first is not None
        assert last is not None
        self.check()
        self._step_rows = rows
        self._slots, self._positions = batch.places()
        first.source[: len(embedded)].copy_(embedded)
        self._begin_experts()
        try:
            for stay in self.stays:
                assert stay.program is not None
                for helper in helpers_of([stay]):
                    helper.start(len(embedded), self._coordinator.fail)
                stay.program.run(self._slots, self._positions)
            if helpers_of(self.stays):
                self._wait_for_the_last()
            logits = last.result[: len(embedded)].cpu()
            self._coordinator.end()
            for helper in helpers_of(self.stays):  # they have answered, and only have to come to their end
                if not comes_true(helper.is_done, GRACE_S):
                    raise StalledError(f"{helper.device} has not finished its part of a step")
        except BaseException:
            self._fail()
            raise
        self._end_experts()
        return logits[batch.logit_rows]

    def _begin_experts(self) -> None:
        store = self._parts.weights.experts
        store.slots.settle()
        publish(list(self._on_gpus.values()))
        store.slots.gpus_rest = bool(self._rounds)
        self._coordinator.begin([Round(*of) for of in self._rounds.values()])

    def _end_experts(self) -> None:
        """Tell the store what its GPUs have found by themselves; between steps, experts may move there."""
        store = self._parts.weights.experts
        store.slots.gpus_rest = False
        for box, layers in self._rounds.values():
            for number, layer in enumerate(layers):
                needed, (elsewhere, *others) = box.chosen(number)
                names = box.answerers[1:]
                found = {self._tiers[name]: len(part) for name, part in zip(names, others, strict=True)}
                own = len(needed) - len(elsewhere) - sum(found.values())
                found[self._parts.weights.places.tiers[layer]] = own
                store.used_in_step(layer, needed, elsewhere, found)

    def _wait_for_the_last(self) -> None:
        """Until the last device is through. Where the step fails and a GPU hangs, raises StalledError."""
        device, failed_at = self.stays[-1].recorder.device, None
        is_done = reached(device)
        while not is_done():
            if failed_at is None and self._coordinator.has_failed:
                failed_at = time.monotonic()
            if failed_at is not None and time.monotonic() - failed_at > GRACE_S:
                raise StalledError(f"{device} has not finished a step that has failed")
            time.sleep(PAUSE_S)

    def _fail(self) -> None:
        """Nothing stays claimed, and no GPU waits; those that do not come to an end are remembered."""
        self._coordinator.give_up()
        self._parts.weights.experts.slots.gpus_rest = False
        if self._acquired is not None:
            self._acquired.__exit__()
            self._acquired = None
        waits = [(helper.device, helper.is_done) for helper in helpers_of(self.stays)]
        waits += [(device, reached(device)) for device in {stay.recorder.device for stay in self.stays}]
        self._busy = [(device, is_done) for device, is_done in waits if not comes_to_an_end(is_done)]

    def check(self) -> None:
        """Before a step: raise StalledError while a GPU has not come to the end of one that has failed."""
        self._busy = [(device, is_done) for device, is_done in self._busy if not is_done()]
        if self._busy:
            raise StalledError(
                f"{self._busy[0][0]} has not come to the end of a step that has failed; if that lasts, "
                "restart the server"
            )

    def begin(self, width: int) -> Buffer:
        """What the step begins with, `[rows, width]`."""
        self._stay.source = self._recorder.input(width)
        return self._stay.source

    def finish(self, source: Buffer, result: Buffer) -> None:
        self._stay.result = result
        for box, _ in self._rounds.values():  # making programs runs them: nobody is to wait
            box.abandon()
        for stay in self.stays:
            assert stay.source is not None
            stay.program = stay.recorder.finish(stay.source, stay.result or stay.source)
            for helping in stay.helping:
                helping.finish()
        if helpers_of(self.stays) and self._recorder.device.type == "cuda":
            # A kernel is loaded when it is first used, and that may wait for a GPU which waits for another.
            self._slots, self._positions = [0], [0]
            for work in self._between:
                work(1)

    def nbytes(self, result: Buffer) -> dict[torch.device, int]:
        """Bytes that the programs would hold, by device."""
        self._stay.result = result
        found: dict[torch.device, int] = defaultdict(int)
        for stay in self.stays:
            assert stay.source is not None
            found[stay.recorder.device] += stay.recorder.nbytes(stay.source, stay.result or stay.source)
            for helping in stay.helping:
                assert helping.x is not None
                found[helping.recorder.device] += helping.recorder.nbytes(helping.x, helping.x)
        for (_, device), copy in self._copies.items():
            found[device] += copy.nbytes
        return found

    def parts(self) -> list[StepPart]:
        """What each device does."""
        return [part for stay in self.stays for part in stay.parts()]

    # --------------------------------------------------------------------------------- between devices

    def at_layer(self, number: int | None) -> None:
        self._layer = number
        super().at_layer(number)

    def move(self, device: torch.device, *values: Buffer) -> Sequence[Buffer]:
        if device == self._recorder.device:
            return values
        origin = self._stay
        self._stay = Stay(self._recorder_on(device))
        self.stays.append(self._stay)
        self._recorder = self._stay.recorder
        self._recorder.layer = self._layer
        origin.result = values[0]
        moved = [self._stay.take(value, origin) for value in values]
        if self._selected is not None:
            self._selected = self._stay.take(self._selected, origin)
        if self._pool is not None:
            self._pool = self._stay.take(self._pool, origin)
        self._copied = None
        self._turns = {}
        self._kv = {}
        return moved

    def select(self, number: int, queries: Buffer, weights: Buffer) -> None:
        source = self._config.kv_source_of(number)
        assert source is not None
        self._copied = None
        keys = self._cache.sources[source].index_keys
        if keys.device == self._recorder.device:
            super().select(number, queries, weights)
            return
        c, here = self._config, self._stay
        there = Stay(self._recorder_on(keys.device))
        there.recorder.layer = number
        given = [queries, weights, *([] if self._pool is None else [self._pool])]
        asked = [there.recorder.input(value.width, value.dtype) for value in given]
        chosen, pool = there.recorder.select(
            asked[0],
            asked[1],
            keys,
            self._cache.sources[source].ratio,
            Selector(c.index_topk, c.candidate_block_size, c.candidate_topk_blocks),
            asked[2] if self._pool is not None else None,
            makes_pool=number == c.candidate_source_layer_id,
        )
        there.program = there.recorder.finish(asked[0], chosen)
        found = [chosen, *([] if pool is None else [pool])]
        outs = [self._recorder.buffer(value.width, value.dtype) for value in found]

        def work(rows: int) -> None:
            assert there.program is not None
            for value, to in zip(given, asked, strict=True):
                there.rows(to, rows).copy_(here.rows(value, rows))
            there.program.run(self._slots, self._positions)
            for value, to in zip(found, outs, strict=True):
                here.rows(to, rows).copy_(there.rows(value, rows))

        self._between.append(work)
        self._recorder.hand_over(work, given, outs)
        self._selected, *pools = outs
        self._pool = pools[0] if pools else self._pool

    def attend(self, number: int, attn: StreamAttention, q: Buffer, kv: Buffer) -> Buffer:
        source = self._config.kv_source_of(number)
        if source is None or self._cache.sources[source].entries.device == self._recorder.device:
            return super().attend(number, attn, q, kv)
        entries, chosen = self._entries_from(source)
        window = self._cache.windows[number]
        self._recorder.ring(kv, window)
        return self._recorder.attend_sparse(
            q, window, attn.sink, self._config.sliding_window, entries, chosen
        )

    def _entries_from(self, source: int) -> tuple[Rows, Buffer]:
        """The chosen entries of another device, copied to this one: `[slots, k, dim]`, and which of them."""
        here, selected, held = self._stay, self._selected, self._cache.sources[source].entries
        entries = bytes_of(held)
        assert selected is not None
        key = source, self._recorder.device
        if key not in self._copies:
            shape = len(entries), selected.width, entries.shape[2]
            self._copies[key] = torch.zeros(shape, dtype=entries.dtype, device=self._recorder.device)
        copy = self._copies[key]
        if self._copied is not None:
            return like(held, copy), self._copied
        copied = self._recorder.buffer(selected.width, torch.int64)

        def work(rows: int) -> None:
            slots = torch.tensor(self._slots)
            chosen = here.rows(selected, rows).to(entries.device)
            found = entries[slots.to(entries.device).unsqueeze(1), chosen.clamp(min=0)]  # [rows, k, dim]
            copy[slots.to(copy.device)] = found.to(copy.device)
            numbers = torch.arange(selected.width, device=copy.device).expand(rows, -1)
            here.rows(copied, rows).copy_(torch.where(chosen.to(copy.device) < 0, -1, numbers))

        self._between.append(work)
        self._recorder.hand_over(work, [selected], [copied])
        self._copied = copied
        return like(held, copy), copied

    # ---------------------------------------------------------------------------- Engram and experts

    def _look_ahead(self, number: int) -> None:
        """Multiply the table rows of the next layer beside what this one multiplies, if it is on this
        device."""
        layers = self._parts.weights.layers
        if number >= len(layers) or layers[number].device != self._recorder.device or number in self._kv:
            return
        if layers[number].engram is not None:
            self._kv[number] = self._engram_kv(number)

    def engram(self, number: int, streams: Buffer) -> Buffer:
        layer = self._parts.weights.layers[number]
        assert layer.engram is not None
        kv = self._kv[number] if number in self._kv else self._engram_kv(number)
        return self._recorder.engram(streams, kv, layer.engram.qk, layer.engram.norm_eps)

    def _engram_kv(self, number: int) -> Buffer:
        """Keys and value of the tokens' table rows, once these are there."""
        layer, here = self._parts.weights.layers[number], self._stay
        assert layer.engram is not None
        rows_of = self._recorder.buffer(int(layer.engram.wkv.shape[1]))

        def work(rows: int) -> None:
            assert self._step_rows is not None
            here.rows(rows_of, rows).copy_(self._step_rows.wait(self._parts.table(number)))

        self._recorder.hand_over(work, [], [rows_of])
        (kv,) = self.linears(rows_of, layer.engram.wkv)
        return kv

    def prefetch(self, number: int, streams: Buffer, pre: Buffer, written: Written[Buffer]) -> None:
        layer, store = self._parts.weights.layers[number], self._parts.weights.experts
        if written is None or store.slots.keeps_copies:
            return
        if layer.device != self._recorder.device:
            return  # its router is on another one
        c = self._config
        x = self.read_streams(self.write_streams(streams, *written), pre)
        x = self.norm(x, layer.ffn_norm, c.rms_norm_eps)
        (logits,) = self.linears(x, layer.gate)
        ids, _ = self._recorder.route(logits, layer.gate_bias, c.routing)
        self._guess = number, ids

    def route(self, logits: Buffer, bias: torch.Tensor | None, rule: RoutingRule) -> tuple[Buffer, Buffer]:
        slots = self._slots_here()
        if slots is None or self._layer is None or not isinstance(self._recorder, GpuRecorder):
            return super().route(logits, bias, rule)
        return self._recorder.route(logits, bias, rule, slots.places[self._layer])

    def _slots_here(self) -> SlotsOnGpu | None:
        """The experts of the device that is recorded, if it can find them by itself."""
        places = self._on_gpus.get(self._recorder.device)
        return None if places is None or self._layer is None else places.slots(self._layer)

    def acquire(self, number: int, ids: Buffer) -> None:
        here = self._stay
        self._look_ahead(number + 1)
        if self._slots_here() is not None:
            return  # they are found where they are computed

        def work(rows: int) -> None:
            self._acquired = self._parts.weights.experts.acquire(number, here.rows(ids, rows).cpu())

        self._recorder.hand_over(work, [ids], [])

    def experts(self, number: int, x: Buffer, ids: Buffer, weights: Buffer) -> Buffer:
        here, guess, store = self._stay, self._guess, self._parts.weights.experts
        self._guess = None
        slots, recorder = self._slots_here(), self._recorder
        if slots is not None and isinstance(recorder, GpuRecorder):
            box, layers = self._round(recorder, x.width, ids.width)
            at = len(layers)
            layers.append(number)
            guesses = None if guess is None else guess[1]
            limit = self._config.swiglu_limit
            for helping in here.helping:
                theirs = self._on_gpus[helping.recorder.device].slots(number)
                helping.serve(theirs, number, limit, box, at)
            return recorder.experts(x, ids, weights, slots, limit, box, at, guesses)
        out = self._recorder.buffer(x.width)

        def work(rows: int) -> None:
            if guess is not None and store.wants_guesses(guess[0]):
                store.prefetch(guess[0], here.rows(guess[1], rows).t().flatten().cpu().tolist())
            assert self._acquired is not None
            with self._acquired as acquired:
                limit = self._config.swiglu_limit
                here.rows(out, rows).copy_(acquired.run(here.rows(x, rows), here.rows(weights, rows), limit))
            self._acquired = None

        guessed = [] if guess is None else [guess[1]]
        self._recorder.hand_over(work, [x, ids, weights, *guessed], [out])
        return out

    def _round(self, recorder: GpuRecorder, hidden: int, top_k: int) -> tuple[Mailbox, list[int]]:
        """The mailbox of a stay's program, and the layers of its hand-overs so far; begins what others do."""
        if id(recorder) not in self._rounds:
            pinned = recorder.device.type == "cuda"
            others = [device for device in self._on_gpus if device != recorder.device]
            box = Mailbox(
                self._config.num_hidden_layers, recorder.max_rows, top_k, hidden,
                pinned=pinned, others=[str(device) for device in others],
            )  # fmt: skip
            self._rounds[id(recorder)] = box, []
            for answerer, device in enumerate(others, 1):
                helps = self._recorder_on(device)
                assert isinstance(helps, GpuRecorder)
                self._stay.helping.append(Helping(helps, answerer))
        return self._rounds[id(recorder)]
