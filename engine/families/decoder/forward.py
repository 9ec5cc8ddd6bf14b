"""A loaded decoder of any of these families: its forward at once, recorded, and on GPUs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, partial
from typing import TYPE_CHECKING

import torch

from engine.families.base import NO_TRACE, Batch, KvCache, KvRooms, Model, ModelInfo, Trace
from engine.families.decoder.cache import CacheLayout, DecoderCache
from engine.families.decoder.description import Description
from engine.families.decoder.layers import DecoderLayers
from engine.families.decoder.stored import RowsInFile
from engine.families.decoder.weights import DecoderWeights, RouterWeights
from engine.families.held import by_part, dense_bytes
from engine.families.on_gpus.record import record_on_gpus
from engine.families.places import HOST
from engine.families.replay import replay
from engine.layers.eager import Eager
from engine.layers.recorded import Recorded
from engine.layers.recorded_experts import RecordedExperts
from engine.layers.rope import Rotation
from engine.layers.routed_experts import EagerExperts
from memory.experts.store import ExpertStore
from memory.planner.placement import Placement
from memory.telemetry import Telemetry
from quant.formats.kv_names import KvFormat
from quant.kernels.choice import recorder_of
from quant.kernels.cpu.program import Buffer, Program
from quant.kernels.cpu.recorder import Recorder
from quant.kernels.interface import Kernels

if TYPE_CHECKING:
    from engine.families.decoder.on_gpus import DecoderOnGpus
    from engine.families.on_gpus.step import RecorderOn, StepExperts
    from memory.experts.coordinator import Coordinator

MAX_ROWS = 16  # of a recorded step; larger ones are computed operation by operation


class Decoder(Model):
    """A loaded model of any of these families."""

    def __init__(
        self,
        description: Description,
        info: ModelInfo,
        kernels: Kernels,
        weights: DecoderWeights,
        kv_format: KvFormat,
    ) -> None:
        self.description = description
        self.info = info
        self.kernels = kernels
        self.weights = weights
        self.layers = DecoderLayers(description, weights)
        self.kv_format = kv_format
        devices = tuple(layer.device for layer in weights.layers)
        self.cache_layout = CacheLayout.of(description, devices, kv_format)
        self._coordinator: Coordinator | None = None  # of recorded steps on GPUs
        self._arenas: dict[int, int] = {}  # by capacity
        self._captures = False
        self._captured: list[torch.Tensor] = []

    def close(self) -> None:
        if self._coordinator is not None:
            self._coordinator.close()
        if self.weights.experts is not None:
            self.weights.experts.close()

    @property
    def held_bytes(self) -> dict[str, dict[str, int]]:
        return by_part(self._dense_bytes, self.weights.experts)

    @cached_property
    def _dense_bytes(self) -> dict[str, int]:
        """Bytes by tier of what every token reads."""
        return dense_bytes(self.weights, [self.weights.norm], [])

    @property
    def placement(self) -> Placement:
        return self.weights.places.placement

    def expert_tiers(self) -> list[list[str]]:
        if self.weights.experts is None:
            return []
        tiers: list[list[str]] = [[] for _ in self.description.layers]
        for layer, held in zip(
            self.description.expert_layers, self.weights.experts.expert_locations(), strict=True
        ):
            tiers[layer] = held
        return tiers

    def expert_uses(self) -> list[list[float]]:
        store = self.weights.experts
        if store is None or store.is_still:
            return []
        uses: list[list[float]] = [[] for _ in self.description.layers]
        for layer, counts in zip(self.description.expert_layers, store.uses(), strict=True):
            uses[layer] = counts
        return uses

    @property
    def telemetry(self) -> Telemetry | None:
        return None if self.weights.experts is None else self.weights.experts.telemetry

    def capture(self) -> bool:
        """The last hidden states, behind the last norm. On GPUs nothing is captured yet."""
        self._captures = self._is_on_host and self.description.is_last
        return self._captures

    def captured(self) -> list[torch.Tensor]:
        return self._captured

    def drop_captured(self) -> None:
        self._captured = []

    # ---------------------------------------------------------------------------------------- the cache

    def new_cache(self, slots: int, capacity: int) -> DecoderCache:
        """Raises BudgetError where a GPU's part is more than was kept free there when loading."""
        self.weights.places.check_kv(slots, capacity, self.cache_layout.layer_bytes)
        cache = DecoderCache(self.cache_layout, slots, capacity)
        recorder = self._recorder()
        if recorder is not None:
            self._record(recorder, cache)
        elif not self._is_on_host:
            cache.decoder, nbytes = self._record_on_gpus(cache)
            cache.on_host = nbytes[HOST]
            cache.step_parts = [] if cache.decoder is None else cache.decoder.parts()
        return cache

    def kv_rooms(self, slots: int) -> KvRooms:
        return self.weights.places.kv_rooms(slots, self.cache_layout.layer_bytes)

    def cache_bytes(self, slots: int, capacity: int) -> int:
        kv = sum(
            self.cache_layout.layer_bytes(layer, slots, capacity)
            for layer, device in enumerate(self.cache_layout.devices)
            if device == HOST
        )
        return kv + self._arena_bytes(capacity if self.cache_layout.has_index_keys else 1)

    def _arena_bytes(self, capacity: int) -> int:
        """Bytes of a program's buffers, if there is one; with indexers, they grow with the capacity."""
        if capacity not in self._arenas:
            if self._is_on_host:
                program = self.new_cache(1, capacity).program
                self._arenas[capacity] = 0 if program is None else program.nbytes
            else:
                cache = DecoderCache(self.cache_layout, 1, capacity)
                self._arenas[capacity] = self._record_on_gpus(cache, only_look=True)[1][HOST]
        return self._arenas[capacity]

    # -------------------------------------------------------------------------------------- the forward

    def _step(self, batch: Batch, cache: KvCache, trace: Trace | None) -> torch.Tensor:
        assert isinstance(cache, DecoderCache)
        if not self.description.is_last:
            batch = batch.of_all()
        if trace is None and cache.program is not None and batch.is_decode(cache.program.max_rows):
            return self._replay(cache.program, cache, batch)
        if cache.decoder is not None:
            cache.decoder.check()
            if trace is None and batch.is_decode(MAX_ROWS):
                with torch.inference_mode():
                    return cache.decoder.run(batch, self._embedded(batch.token_ids))
        return self._compute(batch, cache, trace or NO_TRACE)

    @torch.inference_mode()
    def _compute(self, batch: Batch, cache: DecoderCache, trace: Trace) -> torch.Tensor:
        """The logits of any batch, operation by operation."""
        ops = self._eager(batch, cache)
        with self._eager_experts(len(batch.ids)) as routed:
            x = self.layers.run(ops, routed, self._source(batch), trace)
        if not self.description.is_last:
            return x.float().cpu()
        if not self._captures:
            states = self.layers.states(ops, x[batch.logit_rows.to(x.device)])
            return self.layers.logits(ops, states).float().cpu()
        states = self.layers.states(ops, x)
        self._captured = _by_segment(states, batch)
        return self.layers.logits(ops, states[batch.logit_rows]).float()

    def _eager(self, batch: Batch, cache: DecoderCache) -> Eager:
        """Operations that compute a batch at once."""
        positions = torch.cat([torch.arange(s.start, s.start + s.length) for s in batch.segments])
        rotation = Rotation.at(self.kernels, positions, self.weights.frequencies).times(self._turn_factor)
        extend = partial(cache.extend, self.kernels.encode_rows)
        extend_index = partial(cache.index_keys.extend, self.kernels.encode_rows)
        return Eager(self.kernels, batch.segments, rotation, extend, extend_index, cache.state)

    def _eager_experts(self, tokens: int) -> AbstractContextManager[EagerExperts | None]:
        experts = self.description.experts
        if self._store is None or experts is None:
            return nullcontext()
        counts = [tokens] * len(self.description.expert_layers)
        return EagerExperts(self._store, self._limit, counts, experts.router.top_k)

    def _replay(self, program: Program, cache: DecoderCache, batch: Batch) -> torch.Tensor:
        """The logits of a batch of new tokens, by a recorded program: the same bits."""
        if batch.states is not None or not isinstance(self.weights.embed, torch.Tensor):
            program.source[: len(batch.ids)] = self._source(batch)
        logits = replay(program, cache.routed, batch, cache)
        if cache.last_states is not None:
            states = program.rows(cache.last_states)[: len(batch.ids)]
            self._captured = _by_segment(states, batch)
        return logits

    def _recorder(self) -> Recorder | None:
        """Notes steps, where all that every token reads lies in host memory."""
        return recorder_of(self.kernels, MAX_ROWS) if self._is_on_host else None

    @property
    def _is_on_host(self) -> bool:
        devices = {layer.device for layer in self.weights.layers} | {self.weights.norm.device}
        return devices == {HOST}

    def _record(self, recorder: Recorder, cache: DecoderCache) -> None:
        """Give `cache` a program that decodes with it."""
        ops = self._notes(recorder, cache)
        embed = self.weights.embed
        if isinstance(embed, torch.Tensor) and self.description.is_first:
            source = recorder.embed(embed, self.description.embedding_factor)
        else:
            source = recorder.input(self.description.hidden)
        x = self.layers.run(ops, cache.routed, source, NO_TRACE)
        if not self.description.is_last:
            cache.program = recorder.finish(source, x)
            return
        states = self.layers.states(ops, x)
        if self._captures:
            cache.last_states = states
            recorder.keep(states)
        cache.program = recorder.finish(source, self.layers.logits(ops, states))

    def _notes(self, recorder: Recorder, cache: DecoderCache) -> Recorded:
        """Operations that note a step with `cache`, whose experts are recorded too."""
        places = [cache.place(number) for number in range(len(self.weights.layers))]
        if self._store is not None:
            cache.routed = RecordedExperts(recorder, self._store, self._limit)
        index_keys = cache.index_keys.layer
        return Recorded(recorder, self.weights.frequencies, self._turn_factor, places, index_keys)

    def _record_on_gpus(
        self, cache: DecoderCache, *, only_look: bool = False
    ) -> tuple[DecoderOnGpus | None, dict[torch.device, int]]:
        """Programs that decode with `cache`, and their bytes by device: see `record_on_gpus`."""

        def note(on: RecorderOn) -> tuple[DecoderOnGpus, Buffer]:
            from engine.families.decoder.on_gpus import DecoderOnGpus

            layers = self.weights.layers
            ops = DecoderOnGpus(
                on, layers[0].device, (self.weights.frequencies, self._turn_factor),
                [cache.place(number) for number in range(len(layers))], cache.index_keys.layer,
                self._step_experts(), [layers[n].device for n in self.description.expert_layers],
            )  # fmt: skip
            source = ops.begin(self.description.hidden)
            states = self.layers.states(ops, self.layers.run(ops, ops.routed, source, NO_TRACE))
            return ops, self.layers.logits(ops, states)

        devices = {layer.device for layer in self.weights.layers} | {self.weights.norm.device}
        return record_on_gpus(
            note, devices, self.kernels, MAX_ROWS, cache.capacity, self.weights.places.step_room,
            only_look=only_look,
        )  # fmt: skip

    def _step_experts(self) -> StepExperts | None:
        """The experts of a step on GPUs, and who answers what these do not hold."""
        from engine.families.on_gpus.answers import coordinator_of
        from engine.families.on_gpus.step import StepExperts

        experts, store = self.description.experts, self._store
        if experts is None or store is None:
            return None
        numbers = self.description.expert_layers
        if self._coordinator is None:
            routers = [self.weights.layers[n].feed_forward for n in numbers]
            extras = [
                self.layers.extras(n, router)
                for n, router in zip(numbers, routers, strict=True)
                if isinstance(router, RouterWeights)
            ]
            self._coordinator = coordinator_of(store, self._limit, extras)
        return StepExperts(store, self._coordinator, self._limit, len(numbers), experts.router.experts)

    def _source(self, batch: Batch) -> torch.Tensor:
        """What the layers begin with, `[tokens, hidden]` float32: embedded tokens, or states received."""
        return self._embedded(batch.token_ids) if batch.states is None else batch.states

    def _embedded(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Rows of the embedding as float32; no others are decoded."""
        embed = self.weights.embed
        if isinstance(embed, RowsInFile):
            rows = embed.decoded(token_ids)
        elif isinstance(embed, torch.Tensor):
            rows = embed[token_ids].float()
        else:
            rows = self.kernels.gather_rows(embed, token_ids)
        factor = self.description.embedding_factor
        return rows if factor == 1 else rows * factor

    @property
    def _turn_factor(self) -> float:
        return self.description.rope.attention_factor

    @property
    def _store(self) -> ExpertStore | None:
        return self.weights.experts

    @property
    def _limit(self) -> float:
        """Of the experts' activation, which is the same in all layers."""
        experts = self.description.experts
        assert experts is not None
        return experts.activation.limit


def _by_segment(rows: torch.Tensor, batch: Batch) -> list[torch.Tensor]:
    return list(torch.split(rows, [segment.length for segment in batch.segments]))
