"""DeepSeek-V4.1: the forward pass.

Parallel residual streams (mHC, lagged mix), one shared key=value latent per token, sliding windows
with compressed entries chosen by an indexer, routed experts in every layer, and Engram lookups before some
layers. Section numbers refer to docs/deepseek-v41.md.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from engine.cache.sparse import CacheShape, SparseCache
from engine.families.base import NO_TRACE, Batch, Component, Family, KvCache, Model, ModelInfo, Trace
from engine.families.deepseek_v41.config import V41Config, parse_config
from engine.families.deepseek_v41.places import HOST
from engine.families.deepseek_v41.tensors import IGNORED, components, expected_tensors
from engine.families.deepseek_v41.weights import AttentionWeights, LayerWeights, V41Weights, read_weights
from engine.layers.engram_hash import EngramHash, load_token_map, table_primes
from engine.layers.engram_lookup import EngramLookup, StepRows
from engine.layers.hyper_connections import Mix, first_mix, read_streams, write_streams
from engine.layers.rope import Rotation, inverse_frequencies
from engine.layers.sparse_attention import (
    CandidatePool,
    Selection,
    candidate_blocks,
    select_entries,
)
from memory.checkpoint.checkpoint import Checkpoint
from memory.experts.traces import trace_of_checkpoint
from memory.planner.budget import MemoryBudget
from memory.planner.published import KV_MARGIN
from memory.telemetry import Telemetry
from quant.errors import BudgetError, ConfigError, Findings
from quant.kernels.interface import Kernels, swiglu


@dataclass
class _Step:
    """State of one forward: the batch, and what layers publish for later layers.

    selections and pool are per segment; a source layer replaces them, later layers read them.
    """

    batch: Batch
    cache: SparseCache
    trace: Trace
    bounds: list[tuple[int, int]]
    plain_rotation: Rotation
    compressed_rotation: Rotation
    engram: StepRows | None
    engram_kv: dict[int, torch.Tensor] = field(default_factory=dict)  # by layer, until used
    selections: list[Selection] = field(default_factory=list)
    pools: list[CandidatePool] | None = None
    _rotations: dict[tuple[bool, torch.device], Rotation] = field(default_factory=dict)

    def rotation(self, device: torch.device, *, compressed: bool) -> Rotation:
        """The rotation of the batch's positions on `device`, copied there once."""
        key = compressed, device
        if key not in self._rotations:
            rotation = self.compressed_rotation if compressed else self.plain_rotation
            self._rotations[key] = rotation.to(device)
        return self._rotations[key]


class DeepseekV41(Model):
    """A loaded V4.1 model."""

    def __init__(
        self,
        config: V41Config,
        info: ModelInfo,
        weights: V41Weights,
        token_map: torch.Tensor,
        kernels: Kernels,
    ) -> None:
        self.config = config
        self.info = info
        self.weights = weights
        self.kernels = kernels
        self.token_map = token_map
        self.engram: EngramLookup | None = None
        if config.engram_layer_ids:
            self.engram = EngramLookup(config.engram_layer_ids, hashing_of(config), weights.engram)
        self.plain_frequencies = inverse_frequencies(config.qk_rope_head_dim, config.rope_theta)
        self.compressed_frequencies = inverse_frequencies(
            config.qk_rope_head_dim, config.compress_rope_theta, config.yarn
        )
        self.cache_shape = CacheShape(
            layers=config.num_hidden_layers,
            window=config.sliding_window,
            head_dim=config.head_dim,
            index_dim=config.index_head_dim,
            sources={layer: config.compress_ratios[layer] for layer in config.kv_source_layer_ids},
            history=config.engram_max_ngram_size - 1 if config.engram_layer_ids else 0,
            history_pad=int(token_map[config.engram_pad_token_id]) if config.engram_layer_ids else 0,
            margin=KV_MARGIN,
            devices=tuple(layer.device for layer in weights.layers),
        )

    def close(self) -> None:
        self.weights.experts.close()
        self.weights.engram.close()

    @property
    def tier_bytes(self) -> dict[str, int]:
        dense, engram = self.weights.places.nbytes, self.weights.engram.nbytes
        return {
            tier: nbytes + dense.get(tier, 0) + (engram if tier == "dram" else 0)
            for tier, nbytes in self.weights.experts.tier_bytes.items()
        }

    def expert_tiers(self) -> list[list[str]]:
        return self.weights.experts.expert_locations()

    @property
    def telemetry(self) -> Telemetry:
        return self.weights.experts.telemetry

    def new_cache(self, slots: int, capacity: int) -> SparseCache:
        """Raises BudgetError where a GPU's part is more than was kept free there when loading."""
        needed: dict[str, int] = defaultdict(int)
        for layer, tier in enumerate(self.weights.places.tiers):
            needed[tier] += self.cache_shape.layer_bytes(layer, slots, capacity)
        for tier, room in self.weights.places.kv_room.items():
            if needed[tier] > room:
                raise BudgetError(
                    f"{tier}: the KV cache of {slots} sequences of {capacity} tokens needs "
                    f"{needed[tier] / 1e6:,.1f} MB, but only {room / 1e6:,.1f} MB was reserved for it"
                )
        return SparseCache(self.cache_shape, slots, capacity)

    def cache_bytes(self, slots: int, capacity: int) -> int:
        on_gpus = sum(
            self.cache_shape.layer_bytes(layer, slots, capacity)
            for layer, weights in enumerate(self.weights.layers)
            if weights.device != HOST
        )
        return self.cache_shape.nbytes(slots, capacity) - on_gpus

    def expect(self, drawn: Sequence[tuple[Sequence[int], int]]) -> None:
        if self.engram is None or not drawn:
            return
        history, pad = self.cache_shape.history, self.config.engram_pad_token_id
        ids = [[*[pad] * (history - len(before)), *before[-history:], token] for before, token in drawn]
        self.engram.expect(self.token_map.numpy()[ids])

    @torch.inference_mode()
    def forward(self, batch: Batch, cache: KvCache, trace: Trace | None = None) -> torch.Tensor:
        assert isinstance(cache, SparseCache)
        config, weights = self.config, self.weights
        embedded = weights.embed[batch.token_ids].float()  # [tokens, hidden]
        streams = embedded.unsqueeze(1).repeat(1, config.hc_mult, 1)  # [tokens, hc, hidden]
        pre = first_mix(len(batch.token_ids), config.hc_mult)
        self._prefetch_experts(0, streams, pre)  # first: the disk has nothing to do until then
        step = self._begin(batch, cache, trace or NO_TRACE)
        for number, layer in enumerate(weights.layers):
            streams, pre = streams.to(layer.device), pre.to(layer.device)
            if layer.engram is not None:
                streams = self._read_engram(number, streams, step)

            mix = layer.hc_attn.mix(self.kernels, streams)
            if number > 0 and layer.device == HOST:  # on a GPU, attention leaves no time to use it
                self._prefetch_experts(number, streams, mix.pre)
            x = read_streams(self.kernels, streams, pre)
            x = self.kernels.rms_norm(x, layer.attn_norm, config.rms_norm_eps)
            y = self._attention(number, layer.attn, x, step)
            step.trace.add(f"attn_out.{number}", y)
            streams, pre = write_streams(self.kernels, streams, y, mix), mix.pre

            mix = layer.hc_ffn.mix(self.kernels, streams)
            y = self._experts(number, streams, pre, mix, step)
            streams, pre = write_streams(self.kernels, streams, y, mix), mix.pre
            step.trace.add(f"streams.{number}", streams)
        for segment in batch.segments:
            cache.advance(segment)
        wanted = batch.logit_rows
        final = read_streams(self.kernels, streams[wanted], pre[wanted]).to(weights.norm.device)
        final = self.kernels.rms_norm(final, weights.norm, config.rms_norm_eps)
        return self.kernels.linear(final, weights.head).float().cpu()

    def _begin(self, batch: Batch, cache: SparseCache, trace: Trace) -> _Step:
        """Check the batch, lay out its segments, and request every Engram row it needs."""
        for segment in batch.segments:
            cache.admit(segment)
        ends = torch.tensor([s.length for s in batch.segments]).cumsum(0).tolist()
        bounds = list(zip([0, *ends[:-1]], ends, strict=True))
        positions = torch.cat([torch.arange(s.start, s.start + s.length) for s in batch.segments])
        engram = None
        if self.engram is not None:
            keys = self.token_map[batch.token_ids]
            engram = self.engram.begin(
                [
                    cache.extend_history(segment, keys[start:stop])
                    for segment, (start, stop) in zip(batch.segments, bounds, strict=True)
                ]
            )
            trace.add("engram_rows", engram.rows)
        return _Step(
            batch=batch,
            cache=cache,
            trace=trace,
            bounds=bounds,
            plain_rotation=Rotation.at(positions, self.plain_frequencies),
            compressed_rotation=Rotation.at(positions, self.compressed_frequencies),
            engram=engram,
        )

    def _read_engram(self, number: int, streams: torch.Tensor, step: _Step) -> torch.Tensor:
        """Add the gated value of the tokens' n-gram rows to every stream."""
        layer = self.weights.layers[number]
        assert layer.engram is not None
        kv = step.engram_kv.pop(number) if number in step.engram_kv else self._engram_kv(number, step)
        gates, value = layer.engram.gates_and_value(self.kernels, streams, kv)
        step.trace.add(f"engram_gate.{number}", gates)
        return streams + gates.unsqueeze(-1) * value.unsqueeze(1)

    def _engram_kv(self, number: int, step: _Step) -> torch.Tensor:
        """Keys and value of the tokens' rows for layer `number`: everything but the gates."""
        layer = self.weights.layers[number]
        assert layer.engram is not None
        assert step.engram is not None
        values = step.engram.wait(self._table(number)).to(layer.device)  # [tokens, columns * dim]
        return layer.engram.keys_and_value(self.kernels, values)

    def _with_engram_ahead(self, number: int, streams: torch.Tensor, step: _Step) -> torch.Tensor:
        """About what `_read_engram` will make of the streams; as they are where rows are not there yet."""
        layer = self.weights.layers[number]
        if layer.engram is None or step.engram is None or not step.engram.is_there(self._table(number)):
            return streams
        streams = streams.to(layer.device)
        step.engram_kv[number] = self._engram_kv(number, step)
        step.trace.add(f"engram_kv.{number}", step.engram_kv[number])
        gates, value = layer.engram.gates_and_value(self.kernels, streams, step.engram_kv[number])
        return streams + gates.unsqueeze(-1) * value.unsqueeze(1)

    def _table(self, number: int) -> int:
        """Which of the Engram tables layer `number` reads."""
        return self.config.engram_layer_ids.index(number)

    def _attention(self, number: int, attn: AttentionWeights, x: torch.Tensor, step: _Step) -> torch.Tensor:
        """Sections 4.1 to 4.7 for all tokens, `[tokens, hidden]` to the same."""
        config, linear, rms_norm = self.config, self.kernels.linear, self.kernels.rms_norm
        eps = config.rms_norm_eps
        tokens = x.shape[0]
        ratio = config.compress_ratios[number]
        rotation = step.rotation(x.device, compressed=ratio > 0)
        qr = rms_norm(linear(x, attn.wq_a), attn.q_norm, eps)
        q = linear(qr, attn.wq_b).view(tokens, config.num_attention_heads, config.head_dim)
        q = rotation.apply(self.kernels, q)
        kv = rms_norm(linear(x, attn.wkv), attn.kv_norm, eps)
        kv = rotation.apply(self.kernels, kv)  # [tokens, head_dim]
        if attn.compressor is not None:
            self._compress(number, attn, x, step)
        if attn.indexer_wq_b is not None:
            self._select(number, attn, x, qr, step)

        source = config.kv_source_of(number)
        attended = []
        for i, (segment, (start, stop)) in enumerate(zip(step.batch.segments, step.bounds, strict=True)):
            window_kv = step.cache.extend_window(number, segment, kv[start:stop])
            compressed, entries = None, None
            if source is not None:
                compressed = step.cache.sources[source].entries[segment.slot]
                entries = step.selections[i].to(x.device).entries
            attended.append(
                self.kernels.attend_sparse(
                    q[start:stop], window_kv, attn.sink, config.sliding_window, compressed, entries
                )
            )
        out = attended[0] if len(attended) == 1 else torch.cat(attended)
        out = rotation.inverse.apply(self.kernels, out)
        groups = out.reshape(tokens, config.o_groups, -1)
        low = [linear(groups[:, g], weight) for g, weight in enumerate(attn.wo_a)]
        return linear(torch.cat(low, dim=-1), attn.wo_b)

    def _compress(self, number: int, attn: AttentionWeights, x: torch.Tensor, step: _Step) -> None:
        """Section 4.3: append the entries and index keys of the groups that these tokens complete."""
        config = self.config
        assert attn.compressor is not None
        state = step.cache.sources[number]
        ratio = state.ratio
        kv = self.kernels.linear(x, attn.compressor.wkv)  # [tokens, head_dim]
        gate = kv if attn.compressor.wgate is None else self.kernels.linear(x, attn.compressor.wgate)
        for segment, (start, stop) in zip(step.batch.segments, step.bounds, strict=True):
            first = segment.start // ratio
            count = (segment.start + segment.length) // ratio - first
            latent, gates = step.cache.extend_group(number, segment, kv[start:stop], gate[start:stop])
            if count == 0:
                continue
            if ratio > 1:
                grouped = (count, ratio, config.head_dim)
                latent, gates = latent[: count * ratio], gates[: count * ratio]
                latent = self.kernels.pool_groups(latent.view(grouped), gates.view(grouped))
            latent = self.kernels.rms_norm(latent, attn.compressor.norm, config.rms_norm_eps)
            positions = torch.arange(first, first + count) * ratio
            rotation = Rotation.at(positions, self.compressed_frequencies).to(x.device)
            index_key = self.kernels.linear(latent, attn.compressor.index_wk)
            index_key = self.kernels.rms_norm(index_key, attn.compressor.index_norm, config.rms_norm_eps)
            state.entries[segment.slot, first : first + count] = rotation.apply(self.kernels, latent)
            state.index_keys[segment.slot, first : first + count] = rotation.apply(self.kernels, index_key)

    def _select(
        self, number: int, attn: AttentionWeights, x: torch.Tensor, qr: torch.Tensor, step: _Step
    ) -> None:
        """Sections 4.4 and 4.5: publish which compressed entries each token sees from here on."""
        config = self.config
        assert attn.indexer_wq_b is not None
        assert attn.indexer_weights is not None
        source = config.kv_source_of(number)
        assert source is not None
        state = step.cache.sources[source]
        queries = self.kernels.linear(qr, attn.indexer_wq_b)
        queries = queries.view(-1, config.index_n_heads, config.index_head_dim)
        queries = step.rotation(x.device, compressed=True).apply(self.kernels, queries)
        weights = self.kernels.linear(x, attn.indexer_weights)
        weights = weights * (config.index_head_dim * config.index_n_heads) ** -0.5
        device = state.index_keys.device  # queries go where the keys are, which are many more
        queries, weights = queries.to(device), weights.to(device)
        makes_pool = number == config.candidate_source_layer_id
        pools: list[CandidatePool] = []
        step.selections = []
        for i, (segment, (start, stop)) in enumerate(zip(step.batch.segments, step.bounds, strict=True)):
            ends = torch.arange(segment.start + 1, segment.start + segment.length + 1, device=device)
            seen = ends // state.ratio  # [L]
            keys = state.index_keys[segment.slot, : (segment.start + segment.length) // state.ratio]
            pool = step.pools[i].to(device) if step.pools is not None else None
            selection, scores = select_entries(
                self.kernels, queries[start:stop], weights[start:stop], keys, seen, config.index_topk, pool
            )
            step.selections.append(selection)
            step.trace.add(f"index_selected.{number}", selection.entries)
            if makes_pool:
                pools.append(
                    candidate_blocks(
                        self.kernels, scores, seen, config.candidate_block_size, config.candidate_topk_blocks
                    )
                )
        if makes_pool:
            step.pools = pools

    def _experts(
        self, number: int, streams: torch.Tensor, pre: torch.Tensor, mix: Mix, step: _Step
    ) -> torch.Tensor:
        """Section 5: routed experts and the shared one, `[tokens, hidden]`.

        They read the streams with `pre`; `mix` says how they will be written to them.
        """
        config, layer = self.config, self.weights.layers[number]
        x = read_streams(self.kernels, streams, pre)
        x = self.kernels.rms_norm(x, layer.ffn_norm, config.rms_norm_eps)
        chosen, weights = self._route(layer, x)
        step.trace.add(f"router_ids.{number}", chosen)
        step.trace.add(f"router_weights.{number}", weights)
        with self.weights.experts.acquire(number, chosen.cpu()) as experts:
            shared = layer.shared_experts  # computed while missing experts arrive
            y = swiglu(self.kernels, x, shared.w1, shared.w3, shared.w2, config.swiglu_limit)
            step.trace.add(f"shared_out.{number}", y)
            if number + 1 < config.num_hidden_layers and self.weights.experts.wants_guesses(number + 1):
                ahead = self._with_engram_ahead(
                    number + 1, write_streams(self.kernels, streams, y, mix), step
                )
                # The next layer's experts will read with its attention's mix, which is more like this one's.
                self._prefetch_experts(number + 1, ahead, pre.to(ahead.device))
            return experts.run(x, weights, config.swiglu_limit) + y

    def _prefetch_experts(self, number: int, streams: torch.Tensor, pre: torch.Tensor) -> None:
        """Start prefetching the experts that layer `number` will probably choose, from the streams so far.

        The previous layer's routed experts and this layer's own attention change the streams little, so its
        router predicts most of its choice without them.
        """
        store = self.weights.experts
        if store.wants_guesses(number):
            layer = self.weights.layers[number]
            x = read_streams(self.kernels, streams, pre).to(layer.device)
            guess, _ = self._route(layer, self.kernels.rms_norm(x, layer.ffn_norm, self.config.rms_norm_eps))
            store.prefetch(number, guess.t().flatten().cpu().tolist())  # every token's top choice first

    def _route(self, layer: LayerWeights, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The experts that `layer`'s router chooses for x, and their weights, both `[tokens, top_k]`."""
        config = self.config
        logits = self.kernels.linear(x, layer.gate)
        return self.kernels.route(
            logits, layer.gate_bias, config.num_experts_per_tok, config.routed_scaling_factor
        )


def _table_primes(config: V41Config) -> list[list[int]]:
    """Sizes of the hash tables of each Engram layer."""
    orders = config.engram_max_ngram_size - 1
    return table_primes(len(config.engram_layer_ids), orders, config.engram_n_heads, config.engram_vocab_size)


def hashing_of(config: V41Config) -> EngramHash:
    """The addresses that the Engram layers of `config` use."""
    vocab, max_ngram = config.engram_compressed_vocab_size, config.engram_max_ngram_size
    return EngramHash.for_layers(config.engram_layer_ids, _table_primes(config), vocab, max_ngram)


class DeepseekV41Family(Family):
    """Recognises, describes, checks and loads V4.1 checkpoints."""

    name = "deepseek_v41"

    def describe(self, checkpoint: Checkpoint) -> tuple[ModelInfo, list[Component]]:
        config = parse_config(checkpoint.config)
        return self._info(config, checkpoint), components(config, checkpoint)

    def check(self, checkpoint: Checkpoint) -> None:
        config = parse_config(checkpoint.config)
        findings = Findings()
        with findings.checking():
            checkpoint.verify(expected_tensors(config, checkpoint), IGNORED)
        with findings.checking():
            self._token_map(config, checkpoint)
        with findings.checking():
            trace_of_checkpoint(checkpoint.path, config.num_hidden_layers, config.n_routed_experts)
        findings.raise_any()

    def load(self, checkpoint: Checkpoint, kernels: Kernels, budget: MemoryBudget) -> DeepseekV41:
        self.check(checkpoint)
        config = parse_config(checkpoint.config)
        token_map = self._token_map(config, checkpoint)
        weights = read_weights(config, checkpoint, kernels, budget)
        return DeepseekV41(config, self._info(config, checkpoint), weights, token_map, kernels)

    def _info(self, config: V41Config, checkpoint: Checkpoint) -> ModelInfo:
        return ModelInfo(
            family=self.name,
            name=checkpoint.name,
            vocab_size=config.vocab_size,
            max_context=config.max_position_embeddings,
            bos_token_id=config.bos_token_id,
            eos_token_ids=config.eos_token_ids,
        )

    def _token_map(self, config: V41Config, checkpoint: Checkpoint) -> torch.Tensor:
        """What Engram lookups fold token ids to; empty where there are none."""
        if not config.engram_layer_ids:
            return torch.zeros(0, dtype=torch.int64)
        self._check_tables(config)
        file = checkpoint.path / "tokenizer.json"
        return torch.from_numpy(load_token_map(file, config.vocab_size, config.engram_compressed_vocab_size))

    def _check_tables(self, config: V41Config) -> None:
        """The config's table sizes must be the sums of the primes that the hash will use."""
        expected = tuple(sum(primes) for primes in _table_primes(config))
        if config.engram_num_embeddings != expected:
            raise ConfigError(
                f"engram_num_embeddings is {list(config.engram_num_embeddings)}, but the hash of this "
                f"config addresses {list(expected)} rows; the config and the tables do not match"
            )


FAMILY = DeepseekV41Family()
