"""V4's operations on tensors, computed at once, for the tokens of some segments."""

from __future__ import annotations

import torch

from engine.cache.grouped import GroupedCache, GroupState
from engine.families.base import Batch, Segment, Trace
from engine.families.deepseek_v4.operations import V4Parts
from engine.families.deepseek_v4.weights import Compressor
from engine.families.streams.eager import EagerStreams
from engine.families.streams.weights import StreamAttention
from engine.layers.hyper_connections import ReadMix
from engine.layers.routed_experts import EagerExperts
from engine.layers.sparse_attention import choose_entries
from quant.formats.rows import Rows, bytes_of, row_format_of
from quant.kernels.layers import RoutingRule


class V4Eager(EagerStreams):
    """`V4Operations` for a batch. A context: experts that it has acquired are released at the end."""

    def __init__(self, parts: V4Parts, batch: Batch, cache: GroupedCache, trace: Trace) -> None:
        c = parts.config
        tokens = [len(batch.ids)] * c.layers
        experts = EagerExperts(parts.weights.experts, c.swiglu_limit, tokens, c.routing.top_k)
        super().__init__(parts.kernels, batch, trace, parts.frequencies, parts.config.hc_mult, experts)
        self._config = parts.config
        self._cache = cache
        self._selections: dict[int, torch.Tensor] = {}  # of each piece, of the layer that is being computed
        self._means: list[torch.Tensor] = []  # of streams that are captured

    def streams(self, x: torch.Tensor, n: int) -> torch.Tensor:
        return x.repeat(1, n)

    def capture(self, streams: torch.Tensor) -> None:
        parallel = self._parallel(streams)
        share = streams.new_full(parallel.shape[:2], 1 / parallel.shape[1])
        self._means.append(self._kernels.weighted_sum(parallel, share))

    @property
    def captured(self) -> torch.Tensor:
        """What was captured of all tokens, `[tokens, layers * hidden]`."""
        return torch.cat(self._means, dim=1)

    def reading(self, mix: ReadMix, streams: torch.Tensor) -> torch.Tensor:
        return mix.pre(self._kernels, streams)

    def norm_heads(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return self._kernels.rms_norm(x.view(len(x), -1, len(weight)), weight, eps).view(x.shape)

    # -------------------------------------------------------------------------------------- attention

    def compress(self, number: int, kind: int, compressor: Compressor, x: torch.Tensor) -> None:
        state = self._cache.states[number][kind]
        ratio, eps = state.groups.ratio, self._config.rms_norm_eps
        kv, gate = self.linears(x, compressor.wkv, compressor.wgate)
        for _, segment, at in self._pieces_here():
            positions = torch.arange(segment.start, segment.start + segment.length, device=x.device)
            gates = gate[at] + compressor.ape[positions % ratio]
            rows, gates = state.extend(segment, kv[at], gates)
            first, count = segment.start // ratio, (segment.start + segment.length) // ratio
            count -= first
            if count == 0:
                continue
            pooled = self._pooled(state, rows, gates, first, count)
            latent = self._kernels.rms_norm(pooled, compressor.norm, eps)
            rotation = self._group_rotation(first, count, ratio, x.device)
            entries = rotation.apply(self._kernels, latent)
            new = self._kernels.encode_rows(entries, row_format_of(state.entries))
            bytes_of(state.entries)[segment.slot, first : first + count] = bytes_of(new)

    def _pooled(
        self, state: GroupState, rows: torch.Tensor, gates: torch.Tensor, first: int, count: int
    ) -> torch.Tensor:
        """`count` groups from number `first` on, pooled, `[count, dim]`; rows and gates `[tokens, width]` of
        these, and of what overlaps with the first of them."""
        groups, pool = state.groups, self._kernels.pool_groups
        if not groups.overlaps:
            shape = count, groups.ratio, groups.dim
            return pool(rows[: count * groups.ratio].view(shape), gates[: count * groups.ratio].view(shape))
        before = int(first > 0)
        tokens = (before + count) * groups.ratio
        shape = before + count, groups.ratio, groups.width
        kv, gate = rows[:tokens].view(shape), gates[:tokens].view(shape)
        own, last = slice(groups.dim, None), slice(groups.dim)  # which half is for a token's own group
        found = []
        if not before:  # nothing overlaps with the very first group
            found.append(pool(kv[:1, :, own], gate[:1, :, own]))
        if len(kv) > 1:
            both = [torch.cat((half[:-1, :, last], half[1:, :, own]), dim=1) for half in (kv, gate)]
            found.append(pool(*both))
        return torch.cat(found)

    def select(self, number: int, queries: torch.Tensor, weights: torch.Tensor) -> None:
        state = self._cache.states[number][1]
        queries = queries.view(len(queries), self._config.index_n_heads, -1)
        for i, segment, at in self._pieces_here():
            keys = state.entries[segment.slot, : (segment.start + segment.length) // state.groups.ratio]
            seen, top = self._visible(segment, state, queries.device), self._config.index_topk
            selection, _ = choose_entries(self._kernels, queries[at], weights[at], keys, seen, top)
            self._selections[i] = selection.entries
            self._trace.add(f"index_selected.{number}", selection.entries)

    def attend(self, number: int, attn: StreamAttention, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        states = self._cache.states[number]
        latents = self._kernels.encode_rows(kv, row_format_of(self._cache.windows[number]))

        def seen(i: int, segment: Segment, at: slice) -> tuple[Rows, Rows | None, torch.Tensor | None]:
            window_kv = self._cache.extend_window(number, segment, latents[at])
            if not states:
                return window_kv, None, None
            entries = self._selections[i] if len(states) > 1 else self._all_visible(segment, states[0])
            return window_kv, states[0].entries[segment.slot], entries

        return self._attend(q, attn.sink, self._config.sliding_window, seen)

    def _all_visible(self, segment: Segment, state: GroupState) -> torch.Tensor:
        """Every entry that each token sees, `[L, entries]`, -1 behind."""
        visible = self._visible(segment, state, state.entries.device).unsqueeze(1)
        entries = torch.arange(int(visible[-1]), device=visible.device)
        return torch.where(entries < visible, entries, -1)

    def _visible(self, segment: Segment, state: GroupState, device: torch.device) -> torch.Tensor:
        """How many entries, from the first, each token sees, `[L]`."""
        end = segment.start + segment.length
        return torch.arange(segment.start + 1, end + 1, device=device) // state.groups.ratio

    # ---------------------------------------------------------------------------------------- experts

    def by_token(self, number: int, table: torch.Tensor) -> torch.Tensor:
        return table[self._batch.token_ids]

    def weigh(self, logits: torch.Tensor, ids: torch.Tensor, rule: RoutingRule) -> torch.Tensor:
        return self._kernels.weigh(logits, ids.to(logits.device), rule)

    def wants_guesses(self, number: int) -> bool:
        return self._experts.wants_guesses(number)

    def prefetch(self, number: int, ids: torch.Tensor) -> None:
        self._experts.prefetch(number, ids)
