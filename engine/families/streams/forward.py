"""What the forwards of V4 and V4.1 have in common."""

from __future__ import annotations

from abc import abstractmethod
from functools import cached_property

import torch

from engine.cache.grouped import GroupedShape
from engine.cache.sparse import CacheShape
from engine.families.base import KvRooms, Model, ModelInfo
from engine.families.held import by_part, dense_bytes
from engine.families.places import HOST
from engine.families.streams.config import StreamConfig
from engine.families.streams.operations import MAX_ROWS, StreamOperations
from engine.families.streams.weights import StreamAttention, StreamIndexer, StreamWeights
from engine.layers.operations import Value
from memory.planner.placement import Placement
from memory.telemetry import Telemetry
from quant.kernels.choice import recorder_of
from quant.kernels.cpu.recorder import Recorder
from quant.kernels.interface import Kernels


class StreamModel(Model):
    """A loaded model of either family: all but its layers."""

    config: StreamConfig
    weights: StreamWeights
    cache_shape: GroupedShape | CacheShape

    def __init__(
        self, config: StreamConfig, info: ModelInfo, weights: StreamWeights, kernels: Kernels
    ) -> None:
        self.config = config
        self.info = info
        self.weights = weights
        self.kernels = kernels

    def close(self) -> None:
        self.weights.experts.close()

    @property
    def held_bytes(self) -> dict[str, dict[str, int]]:
        return by_part(self._dense_bytes, self.weights.experts)

    @cached_property
    def _dense_bytes(self) -> dict[str, int]:
        """Bytes by tier of what every token reads."""
        return dense_bytes(self.weights, *self._beside())

    def _beside(self) -> tuple[list[object], list[object]]:
        """Weights that lie with the head, and parts of layers that are in DRAM wherever these are."""
        return [self.weights.norm], []

    @property
    def placement(self) -> Placement:
        return self.weights.places.placement

    def expert_tiers(self) -> list[list[str]]:
        return self.weights.experts.expert_locations()

    def expert_uses(self) -> list[list[float]]:
        return [] if self.weights.experts.is_still else self.weights.experts.uses()

    @property
    def telemetry(self) -> Telemetry:
        return self.weights.experts.telemetry

    def kv_rooms(self, slots: int) -> KvRooms:
        return self.weights.places.kv_rooms(slots, self.cache_shape.layer_bytes)

    def cache_bytes(self, slots: int, capacity: int) -> int:
        on_gpus = sum(
            self.cache_shape.layer_bytes(layer, slots, capacity)
            for layer, device in enumerate(self.cache_shape.devices)
            if device != HOST
        )
        return self.cache_shape.nbytes(slots, capacity) - on_gpus + self._arena_bytes(capacity)

    @abstractmethod
    def _arena_bytes(self, capacity: int) -> int:
        """Bytes of a program's buffers in host memory; scores of compressed entries make them grow with the
        capacity."""

    @property
    def _devices(self) -> set[torch.device]:
        """Where layers and the head are."""
        return {layer.device for layer in self.weights.layers} | {self.weights.norm.device}

    @property
    def _is_on_gpus(self) -> bool:
        return self._devices != {HOST}

    def _recorder(self) -> Recorder | None:
        """Notes steps, where all that every token reads lies in host memory."""
        return None if self._is_on_gpus else recorder_of(self.kernels, MAX_ROWS)

    def _latents(
        self, ops: StreamOperations[Value], attn: StreamAttention, x: Value
    ) -> tuple[Value, Value, Value]:
        """What a layer's attention makes of x first, not turned yet: the latent that queries are made of,
        `[rows, q_lora_rank]`, queries `[rows, heads * head_dim]`, and key and value in one,
        `[rows, head_dim]`."""
        eps = self.config.rms_norm_eps
        qr, kv = ops.linears(x, attn.wq_a, attn.wkv)
        qr, kv = ops.norm(qr, attn.q_norm, eps), ops.norm(kv, attn.kv_norm, eps)
        (q,) = ops.linears(qr, attn.wq_b)
        return qr, q, kv

    def _select(
        self, ops: StreamOperations[Value], number: int, indexer: StreamIndexer, qr: Value, x: Value
    ) -> None:
        """Choose among entries, by queries from their latent and weights from x."""
        c = self.config
        (queries,), (weights,) = ops.linears(qr, indexer.wq_b), ops.linears(x, indexer.weights)
        queries = ops.rotate(queries, c.index_n_heads, compressed=True)
        ops.select(number, queries, ops.scale(weights, (c.index_head_dim * c.index_n_heads) ** -0.5))

    def _shared(self, ops: StreamOperations[Value], number: int, x: Value) -> Value:
        """The output of the expert that every token uses, `[rows, hidden]`."""
        shared = self.weights.layers[number].shared_experts
        gate, up = ops.linears(x, shared.w1, shared.w3)
        (y,) = ops.linears(ops.gated(gate, up, self.config.swiglu_limit), shared.w2)
        ops.trace(f"shared_out.{number}", y)
        return y
