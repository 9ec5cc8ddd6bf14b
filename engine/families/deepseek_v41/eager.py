"""V4.1's operations on tensors, computed at once, for the tokens of some segments."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.cache.sparse import SparseCache
from engine.families.base import Batch, Trace
from engine.families.deepseek_v41.guesses import Guesses
from engine.families.deepseek_v41.operations import StreamMix, V41Parts
from engine.families.deepseek_v41.weights import AttentionWeights, CompressorWeights
from engine.layers.engram_lookup import StepRows
from engine.layers.hyper_connections import HyperConnection, first_mix
from engine.layers.operations import EagerBasics
from engine.layers.rope import Rotation
from engine.layers.routed_experts import EagerExperts
from engine.layers.sparse_attention import CandidatePool, Selection, candidate_blocks, select_entries
from quant.kernels.interface import Weight


class V41Eager(EagerBasics):
    """`V41Operations` for a batch. A context: experts that it has acquired are released at the end.

    rows  of Engram tables, that were asked for
    """

    def __init__(
        self, parts: V41Parts, batch: Batch, cache: SparseCache, trace: Trace, rows: StepRows | None
    ) -> None:
        super().__init__(parts.kernels)
        self._parts = parts
        self._config = parts.config
        self._batch = batch
        self._cache = cache
        self._trace = trace
        self._guesses = Guesses(parts, rows)
        positions = torch.cat([torch.arange(s.start, s.start + s.length) for s in batch.segments])
        frequencies = {False: parts.plain_frequencies, True: parts.compressed_frequencies}
        self._turns = {
            (compressed, torch.device("cpu")): Rotation.at(self._kernels, positions, by)
            for compressed, by in frequencies.items()
        }
        ends = torch.tensor([s.length for s in batch.segments]).cumsum(0).tolist()
        bounds = zip([0, *ends[:-1]], ends, strict=True)
        self._segments = [(s, slice(*bound)) for s, bound in zip(batch.segments, bounds, strict=True)]
        self._selections: list[Selection] = []  # of each segment, from the last source layer on
        self._pools: list[CandidatePool] | None = None
        self._experts = EagerExperts(parts.weights.experts, parts.config.swiglu_limit)

    def __enter__(self) -> V41Eager:
        return self

    def __exit__(self, *raised: object) -> None:
        self._experts.__exit__(*raised)

    def at_layer(self, number: int | None) -> None:
        """All layers are alike."""

    def move(self, device: torch.device, *values: torch.Tensor) -> Sequence[torch.Tensor]:
        return [value.to(device) for value in values]

    def trace(self, name: str, value: torch.Tensor, *shape: int) -> None:
        self._trace.add(name, value.view(-1, *shape) if shape else value)

    # ---------------------------------------------------------------------------------------- streams

    def streams(self, x: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        return x.repeat(1, n), first_mix(len(x), n)

    def mix(self, connection: HyperConnection, streams: torch.Tensor) -> StreamMix[torch.Tensor]:
        mix = connection.mix(self._kernels, self._parallel(streams))
        return StreamMix(mix.pre, mix.post, mix.combine.flatten(1))

    def read_streams(self, streams: torch.Tensor, pre: torch.Tensor) -> torch.Tensor:
        return self._kernels.weighted_sum(self._parallel(streams), pre)

    def write_streams(
        self, streams: torch.Tensor, y: torch.Tensor, mix: StreamMix[torch.Tensor]
    ) -> torch.Tensor:
        parallel = self._parallel(streams)
        combine = mix.combine.view(len(y), *[parallel.shape[1]] * 2)
        return self._kernels.mix_streams(parallel, y, mix.post, combine).flatten(1)

    def engram(self, number: int, streams: torch.Tensor) -> torch.Tensor:
        layer = self._parts.weights.layers[number]
        assert layer.engram is not None
        kv = self._guesses.wait_for_kv(number)
        self._trace.add(f"engram_kv.{number}", kv)
        parallel = self._parallel(streams)
        gates, value = layer.engram.gates_and_value(self._kernels, parallel, kv)
        self._trace.add(f"engram_gate.{number}", gates)
        return (parallel + gates.unsqueeze(-1) * value.unsqueeze(1)).flatten(1)

    def _parallel(self, streams: torch.Tensor) -> torch.Tensor:
        """`[tokens, hc, hidden]`; of no tokens too."""
        return streams.view(len(streams), self._config.hc_mult, self._config.hidden_size)

    # -------------------------------------------------------------------------------------- attention

    def rotate(
        self, x: torch.Tensor, heads: int, *, compressed: bool, backwards: bool = False
    ) -> torch.Tensor:
        rotation = self._rotation(x.device, compressed=compressed)
        if backwards:
            rotation = rotation.inverse
        return rotation.apply(self._kernels, x.view(len(x), heads, -1)).view(x.shape)

    def blocks(self, x: torch.Tensor, weights: Sequence[Weight]) -> torch.Tensor:
        groups = x.view(len(x), len(weights), -1)
        parts = [self._kernels.linear(groups[:, n], weight) for n, weight in enumerate(weights)]
        return torch.cat(parts, dim=-1)

    def compress(self, number: int, compressor: CompressorWeights, x: torch.Tensor) -> None:
        config = self._config
        state = self._cache.sources[number]
        ratio = state.ratio
        kv = self._kernels.linear(x, compressor.wkv)  # [tokens, head_dim]
        gate = kv if compressor.wgate is None else self._kernels.linear(x, compressor.wgate)
        for segment, at in self._segments:
            first = segment.start // ratio
            count = (segment.start + segment.length) // ratio - first
            latent, gates = self._cache.extend_group(number, segment, kv[at], gate[at])
            if count == 0:
                continue
            if ratio > 1:
                grouped = (count, ratio, config.head_dim)
                latent, gates = latent[: count * ratio], gates[: count * ratio]
                latent = self._kernels.pool_groups(latent.view(grouped), gates.view(grouped))
            latent = self._kernels.rms_norm(latent, compressor.norm, config.rms_norm_eps)
            positions = torch.arange(first, first + count) * ratio
            rotation = Rotation.at(self._kernels, positions, self._parts.compressed_frequencies).to(x.device)
            index_key = self._kernels.linear(latent, compressor.index_wk)
            index_key = self._kernels.rms_norm(index_key, compressor.index_norm, config.rms_norm_eps)
            state.entries[segment.slot, first : first + count] = rotation.apply(self._kernels, latent)
            state.index_keys[segment.slot, first : first + count] = rotation.apply(self._kernels, index_key)

    def select(self, number: int, queries: torch.Tensor, weights: torch.Tensor) -> None:
        config = self._config
        source = config.kv_source_of(number)
        assert source is not None
        state = self._cache.sources[source]
        device = state.index_keys.device  # queries go where the keys are, which are many more
        queries = queries.view(len(queries), config.index_n_heads, -1).to(device)
        weights = weights.to(device)
        makes_pool = number == config.candidate_source_layer_id
        pools: list[CandidatePool] = []
        self._selections = []
        for i, (segment, at) in enumerate(self._segments):
            end = segment.start + segment.length
            seen = torch.arange(segment.start + 1, end + 1, device=device) // state.ratio  # [L]
            keys = state.index_keys[segment.slot, : end // state.ratio]
            pool = self._pools[i].to(device) if self._pools is not None else None
            selection, scores = select_entries(
                self._kernels, queries[at], weights[at], keys, seen, config.index_topk, pool
            )
            self._selections.append(selection)
            self._trace.add(f"index_selected.{number}", selection.entries)
            if makes_pool:
                blocks = config.candidate_topk_blocks
                pools.append(
                    candidate_blocks(self._kernels, scores, seen, config.candidate_block_size, blocks)
                )
        if makes_pool:
            self._pools = pools

    def attend(self, number: int, attn: AttentionWeights, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        config = self._config
        q = q.view(len(q), config.num_attention_heads, -1)
        source = config.kv_source_of(number)
        attended = []
        for i, (segment, at) in enumerate(self._segments):
            window_kv = self._cache.extend_window(number, segment, kv[at])
            compressed, entries = None, None
            if source is not None:
                compressed = self._cache.sources[source].entries[segment.slot]
                entries = self._selections[i].to(q.device).entries
            attended.append(
                self._kernels.attend_sparse(
                    q[at], window_kv, attn.sink, config.sliding_window, compressed, entries
                )
            )
        out = attended[0] if len(attended) == 1 else torch.cat(attended)
        return out.flatten(1)

    def _rotation(self, device: torch.device, *, compressed: bool) -> Rotation:
        """The rotation of the batch's positions on `device`, copied there once."""
        key = compressed, device
        if key not in self._turns:
            self._turns[key] = self._turns[compressed, torch.device("cpu")].to(device)
        return self._turns[key]

    # ---------------------------------------------------------------------------------------- experts

    def prefetch(
        self,
        number: int,
        streams: torch.Tensor,
        pre: torch.Tensor,
        y: torch.Tensor | None,
        mix: StreamMix[torch.Tensor] | None,
    ) -> None:
        self._guesses.prefetch(number, streams, pre, y, mix)

    def acquire(self, number: int, ids: torch.Tensor) -> None:
        self._experts.acquire(number, ids)

    def experts(self, number: int, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return self._experts.run(number, x, ids, weights)
