"""Llama and SmolLM2: a dense decoder with grouped-query attention, from GGUF or safetensors.

Weights stay in their stored format; everything else is float32.
"""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass
from functools import cached_property

import torch

from engine.families.base import (
    NO_TRACE,
    Batch,
    Component,
    Family,
    KvCache,
    Model,
    ModelInfo,
    Segment,
    Trace,
)
from engine.families.llama.config import LlamaConfig, parse_config
from engine.families.llama.tensors import IGNORED, components, expected_tensors
from engine.layers.operations import Eager, Operations, Recorded, Value
from engine.layers.rope import Rotation
from memory.checkpoint.checkpoint import Checkpoint
from memory.planner.budget import MemoryBudget
from quant.errors import BudgetError, CheckpointError
from quant.formats.gguf import weight_from_bytes
from quant.kernels.choice import recorder_of
from quant.kernels.cpu.program import Program
from quant.kernels.cpu.recorder import KvPlace, Recorder
from quant.kernels.interface import Kernels, Weight

MAX_ROWS = 16  # of a recorded step; larger ones are computed operation by operation


@dataclass(frozen=True)
class LayerWeights:
    """One layer; matrices as stored, norms float32."""

    attn_norm: torch.Tensor
    q: Weight
    k: Weight
    v: Weight
    o: Weight
    ffn_norm: torch.Tensor
    gate: Weight
    up: Weight
    down: Weight


class LlamaCache(KvCache):
    """Keys and values of every layer, float32, `[2, layers, slots, kv_heads, capacity, head_dim]`."""

    def __init__(self, config: LlamaConfig, slots: int, capacity: int) -> None:
        super().__init__(slots, capacity, margin=capacity)
        shape = (2, config.layers, slots, config.kv_heads, capacity, config.head_dim)
        # Untouched pages cost no memory. Torch would use huge pages, of which even a short sequence needs one
        # per layer and head.
        nbytes = math.prod(shape) * torch.float32.itemsize
        mapped = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._held = torch.frombuffer(mapped, dtype=torch.float32).view(shape)

    @property
    def nbytes(self) -> int:
        return self._held.nbytes + (0 if self.program is None else self.program.nbytes)

    def appended(self, slot: int) -> tuple[tuple[int, torch.Tensor], ...]:
        return ((1, self._held[:, :, slot].permute(3, 0, 1, 2, 4)),)

    def recent(self, slot: int, length: int) -> tuple[torch.Tensor, ...]:
        return ()

    def extend(
        self, layer: int, segment: Segment, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store k and v `[tokens, kv_heads, head_dim]`; return the slot, `[kv_heads, end, head_dim]`."""
        end = segment.start + segment.length
        keys, values = self._held[0, layer, segment.slot], self._held[1, layer, segment.slot]
        keys[:, segment.start : end] = k.transpose(0, 1)
        values[:, segment.start : end] = v.transpose(0, 1)
        return keys[:, :end], values[:, :end]

    def layer(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A layer's keys and values, `[slots, kv_heads, capacity, head_dim]` each."""
        return self._held[0, number], self._held[1, number]


class Llama(Model):
    """A loaded model of the family."""

    def __init__(
        self,
        config: LlamaConfig,
        info: ModelInfo,
        kernels: Kernels,
        embed: Weight,
        layers: tuple[LayerWeights, ...],
        norm: torch.Tensor,
        head: Weight,
        frequencies: torch.Tensor,
    ) -> None:
        self.config = config
        self.info = info
        self.kernels = kernels
        self.embed = embed
        self.layers = layers
        self.norm = norm
        self.head = head
        self.frequencies = frequencies

    @property
    def tier_bytes(self) -> dict[str, int]:
        weights = [
            self.embed,
            self.norm,
            *(weight for layer in self.layers for weight in vars(layer).values()),
        ]
        if self.head is not self.embed:
            weights.append(self.head)
        return {"dram": sum(weight.nbytes for weight in weights)}

    def new_cache(self, slots: int, capacity: int) -> LlamaCache:
        cache = LlamaCache(self.config, slots, capacity)
        recorder = recorder_of(self.kernels, MAX_ROWS)
        if recorder is not None:
            cache.program = self._record(recorder, cache)
        return cache

    def cache_bytes(self, slots: int, capacity: int) -> int:
        c = self.config
        kv = 2 * c.layers * slots * c.kv_heads * capacity * c.head_dim * torch.float32.itemsize
        return kv + self._arena_bytes

    @torch.inference_mode()
    def forward(self, batch: Batch, cache: KvCache, trace: Trace | None = None) -> torch.Tensor:
        assert isinstance(cache, LlamaCache)
        for segment in batch.segments:
            cache.admit(segment)
        if trace is None and cache.program is not None and batch.is_decode(cache.program.max_rows):
            logits = self._replay(cache.program, batch)
        else:
            logits = self._compute(batch, cache, trace or NO_TRACE)
        for segment in batch.segments:
            cache.advance(segment)
        return logits

    def _compute(self, batch: Batch, cache: LlamaCache, trace: Trace) -> torch.Tensor:
        """The logits of any batch, operation by operation."""
        positions = torch.cat([torch.arange(s.start, s.start + s.length) for s in batch.segments])
        rotation = Rotation.at(self.kernels, positions, self.frequencies)
        ops = Eager(self.kernels, batch.segments, rotation, self.config.head_dim, cache.extend)
        x = self._layers(ops, self._embedded(batch.token_ids), trace)
        return self._logits(ops, x[batch.logit_rows])

    def _replay(self, program: Program, batch: Batch) -> torch.Tensor:
        """The logits of a batch of new tokens, by a recorded program: the same bits."""
        rows = len(batch.token_ids)
        program.source[:rows] = self._embedded(batch.token_ids)
        program.run([s.slot for s in batch.segments], [s.start for s in batch.segments])
        return program.result[batch.logit_rows]

    def _record(self, recorder: Recorder, cache: LlamaCache) -> Program:
        """A program that decodes with `cache`."""
        places = [KvPlace(*cache.layer(number)) for number in range(self.config.layers)]
        ops = Recorded(recorder, self.frequencies, places)
        source = recorder.input(self.config.hidden)
        return recorder.finish(source, self._logits(ops, self._layers(ops, source, NO_TRACE)))

    @cached_property
    def _arena_bytes(self) -> int:
        """Bytes of a program's buffers, whatever the cache."""
        program = self.new_cache(slots=1, capacity=1).program
        return 0 if program is None else program.nbytes

    def _layers(self, ops: Operations[Value], x: Value, trace: Trace) -> Value:
        """All layers: x `[tokens, hidden]` to the same."""
        c, eps = self.config, self.config.rms_norm_eps
        for number, layer in enumerate(self.layers):
            q, k, v = ops.linears(ops.norm(x, layer.attn_norm, eps), layer.q, layer.k, layer.v)
            q, k = ops.rotate(q, c.heads), ops.rotate(k, c.kv_heads)
            if c.rope.attention_factor != 1:
                # The keys' share too: only products of the two are used.
                q = ops.scale(q, c.rope.attention_factor**2)
            (attended,) = ops.linears(ops.attend(number, q, k, v), layer.o)
            x = ops.add(x, attended)
            gate, up = ops.linears(ops.norm(x, layer.ffn_norm, eps), layer.gate, layer.up)
            (y,) = ops.linears(ops.gated(gate, up, math.inf), layer.down)
            x = ops.add(x, y)
            trace.add(f"hidden.{number}", x)
        return x

    def _logits(self, ops: Operations[Value], x: Value) -> Value:
        (logits,) = ops.linears(ops.norm(x, self.norm, self.config.rms_norm_eps), self.head)
        return logits

    def _embedded(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Rows of the embedding as float32; no others are decoded."""
        if isinstance(self.embed, torch.Tensor):
            return self.embed[token_ids].float()
        return self.kernels.gather_rows(self.embed, token_ids)


class LlamaFamily(Family):
    """Recognises, describes, checks and loads dense Llama checkpoints."""

    name = "llama"

    def describe(self, checkpoint: Checkpoint) -> tuple[ModelInfo, list[Component]]:
        config = parse_config(checkpoint)
        return self._info(config, checkpoint), components(config, checkpoint)

    def check(self, checkpoint: Checkpoint) -> None:
        checkpoint.verify(expected_tensors(parse_config(checkpoint)), IGNORED)

    def load(self, checkpoint: Checkpoint, kernels: Kernels, budget: MemoryBudget) -> Llama:
        self.check(checkpoint)
        config = parse_config(checkpoint)

        nbytes = sum(entry.nbytes for entry in checkpoint.used(IGNORED).values())
        if nbytes > budget.dram_bytes:
            raise BudgetError(
                f"{checkpoint.path}: the weights are all used for every token and need {nbytes:,} bytes, "
                f"but the memory budget is {budget.dram_bytes:,} bytes; free some memory, raise "
                "--dram-budget or use a smaller model"
            )

        def read(role: str, *layer: int) -> Weight:
            entry = checkpoint.entries[config.names[role].format(*layer)]
            return weight_from_bytes(entry.dtype, entry.shape, checkpoint.read(entry.name))

        def norm(role: str, *layer: int) -> torch.Tensor:
            weight = read(role, *layer)
            assert isinstance(weight, torch.Tensor)
            return weight.float()

        frequencies = config.rope.frequencies(config.head_dim)
        if config.has_rope_factors:
            factors = read("rope_factors")
            assert isinstance(factors, torch.Tensor)
            if not bool(((factors > 0) & factors.isfinite()).all()):
                raise CheckpointError(
                    f"{checkpoint.path}: {config.names['rope_factors']} has values that are not positive "
                    "and finite; download it again"
                )
            frequencies = frequencies / factors.double()

        def paired(role: str, layer: int, heads: int) -> Weight:
            """Query or key rows with the channels of each rotary pair side by side.

            Queries and keys are reordered alike, so their products stay what they are.
            """
            weight = read(role, layer)
            if config.has_pairs_side_by_side:
                return weight
            assert isinstance(weight, torch.Tensor)
            return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)

        layers = tuple(
            LayerWeights(
                attn_norm=norm("attn_norm", n),
                ffn_norm=norm("ffn_norm", n),
                **{role: kernels.prepare(read(role, n)) for role in ("v", "o", "gate", "up", "down")},
                q=kernels.prepare(paired("q", n, config.heads)),
                k=kernels.prepare(paired("k", n, config.kv_heads)),
            )
            for n in range(config.layers)
        )
        embed = kernels.prepare(read("embed")) if config.is_tied else read("embed")
        head = embed if config.is_tied else kernels.prepare(read("head"))
        info = self._info(config, checkpoint)
        return Llama(config, info, kernels, embed, layers, norm("norm"), head, frequencies)

    def _info(self, config: LlamaConfig, checkpoint: Checkpoint) -> ModelInfo:
        name = checkpoint.config.get("general.name")
        return ModelInfo(
            family=self.name,
            name=name if isinstance(name, str) else checkpoint.name,
            vocab_size=config.vocab_size,
            max_context=config.max_context,
            bos_token_id=config.bos_token_id,
            eos_token_ids=config.eos_token_ids,
        )


FAMILY = LlamaFamily()
