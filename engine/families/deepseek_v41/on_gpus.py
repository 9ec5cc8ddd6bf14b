"""V4.1's operations noted for several devices: one program for each stay on a device, run one after the
other.

A step goes from device to device as layers do, and takes along what later layers need. Compressed entries
stay
with the layer that made them: where another device asks for some, queries travel to their index keys, and the
chosen entries come back to a copy of their own, once for all layers that share the choice.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from engine.cache.sparse import SparseCache
from engine.families.base import Batch
from engine.families.deepseek_v41.notes import V41Notes
from engine.families.deepseek_v41.operations import V41Parts
from engine.families.streams.operations import Written
from engine.families.streams.weights import StreamAttention
from engine.layers.engram_lookup import StepRows
from memory.experts.coordinator import Coordinator, Round
from memory.experts.step import ExpertStep
from quant.formats.rows import Rows, bytes_of, like
from quant.kernels.cpu.cache_notes import Selector
from quant.kernels.cpu.program import Buffer
from quant.kernels.cuda.mailbox import Mailbox
from quant.kernels.cuda.recorder import GpuRecorder
from quant.kernels.cuda.step_experts import SlotsOnGpu
from quant.kernels.layers import RoutingRule
from quant.kernels.recording import StepProgram, StepRecorder

RecorderOn = Callable[[torch.device], StepRecorder]


def coordinator_of(parts: V41Parts) -> Coordinator:
    """Answers what GPUs do not hold from the expert store."""
    store, limit = parts.weights.experts, parts.config.swiglu_limit

    @torch.inference_mode()
    def answer(layer: int, ids: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return store.outputs(layer, ids, x, limit)

    def foresee(layer: int, guess: list[int]) -> None:
        if store.wants_guesses(layer):
            store.prefetch(layer, guess)

    return Coordinator(answer, foresee)


@dataclass
class Stay:
    """A part of a step on one device, and its program once it is made.

    source, result  of the program
    """

    recorder: StepRecorder
    source: Buffer | None = None
    result: Buffer | None = None
    program: StepProgram | None = None

    def take(self, value: Buffer, origin: Stay) -> Buffer:
        """A value of another stay, from now on here."""
        to = self.recorder.input(value.width, value.dtype)
        origin.recorder.hand_over(lambda rows: self._copy(to, origin, value, rows), [value], [])
        self.source = self.source or to
        return to

    def rows(self, buffer: Buffer, rows: int) -> torch.Tensor:
        """The rows of a buffer that are alive, on its device."""
        assert self.program is not None
        return self.program.rows(buffer)[:rows]

    def _copy(self, to: Buffer, origin: Stay, value: Buffer, rows: int) -> None:
        self.rows(to, rows).copy_(origin.rows(value, rows))


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

    # ------------------------------------------------------------------------------------------- running

    def run(self, batch: Batch, embedded: torch.Tensor, rows: StepRows | None) -> torch.Tensor:
        first, last = self.stays[0].program, self.stays[-1].program
        assert first is not None
        assert last is not None
        self._step_rows = rows
        self._slots = [segment.slot for segment in batch.segments]
        self._positions = [segment.start for segment in batch.segments]
        first.source[: len(embedded)].copy_(embedded)
        self._begin_experts()
        try:
            for stay in self.stays:
                assert stay.program is not None
                stay.program.run(self._slots, self._positions)
            logits = last.result[: len(embedded)].cpu()
            self._coordinator.end()
        except BaseException:
            self._fail()
            raise
        self._end_experts()
        return logits[batch.logit_rows]

    def _begin_experts(self) -> None:
        store = self._parts.weights.experts
        store.slots.settle()
        for places in store.on_gpus.values():
            places.publish()
        store.slots.gpus_rest = bool(self._rounds)
        self._coordinator.begin([Round(*of) for of in self._rounds.values()])

    def _end_experts(self) -> None:
        """Tell the store what its GPUs have found by themselves; between steps, experts may move there."""
        store = self._parts.weights.experts
        store.slots.gpus_rest = False
        for box, layers in self._rounds.values():
            for number, layer in enumerate(layers):
                tier = self._parts.weights.places.tiers[layer]
                store.used_in_step(layer, *box.chosen(number), tier)

    def _fail(self) -> None:
        """Nothing stays claimed, and no GPU waits."""
        self._coordinator.give_up()
        self._parts.weights.experts.slots.gpus_rest = False
        if self._acquired is not None:
            self._acquired.__exit__()
            self._acquired = None
        for stay in self.stays:
            if stay.recorder.device.type == "cuda":
                torch.cuda.synchronize(stay.recorder.device)

    def begin(self, width: int) -> Buffer:
        """What the step begins with, `[rows, width]`."""
        self._stay.source = self._recorder.input(width)
        return self._stay.source

    def finish(self, source: Buffer, result: Buffer) -> None:
        self._stay.result = result
        for stay in self.stays:
            assert stay.source is not None
            stay.program = stay.recorder.finish(stay.source, stay.result or stay.source)

    def nbytes(self, result: Buffer) -> dict[torch.device, int]:
        """Bytes that the programs would hold, by device."""
        self._stay.result = result
        found: dict[torch.device, int] = defaultdict(int)
        for stay in self.stays:
            assert stay.source is not None
            found[stay.recorder.device] += stay.recorder.nbytes(stay.source, stay.result or stay.source)
        for (_, device), copy in self._copies.items():
            found[device] += copy.nbytes
        return found

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
        places = self._parts.weights.experts.on_gpus.get(self._recorder.device)
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
            layers.append(number)
            guesses = None if guess is None else guess[1]
            limit = self._config.swiglu_limit
            return recorder.experts(x, ids, weights, slots, limit, box, len(layers) - 1, guesses)
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
        """The mailbox of a stay's program, and the layers of its hand-overs so far."""
        if id(recorder) not in self._rounds:
            pinned = recorder.device.type == "cuda"
            count = self._config.num_hidden_layers
            self._rounds[id(recorder)] = Mailbox(count, recorder.max_rows, top_k, hidden, pinned=pinned), []
        return self._rounds[id(recorder)]
