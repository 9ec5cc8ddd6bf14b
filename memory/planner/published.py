"""Shapes of the models that can be planned by name, from their published dimensions.

Sources: the released configuration and checkpoint headers of DeepSeek V4.1
(dimensions; which tensors there are; FP8 in tiles, FP4 experts in groups of 32, the rest bf16 or
fp32). Draft stages and image encoders are left out: text generation does not use them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from memory.planner.launches import gpu_launches
from memory.planner.shape import KeptRows, KvShape, LayerShape, ModelShape, Table, Weights
from quant.errors import ConfigError
from quant.formats.kv import v41_rows
from quant.formats.kv_names import V41_FORMATS, KvChoice, KvFormat, resolve
from quant.formats.rows import row_bytes

TOKEN_KEY_BYTES = 8
KV_VALUE_BYTES = 4  # of what a cache keeps exactly whatever its format
# Tokens by which the engine's rings exceed what attention reads: a chat prompt ends with a few tokens
# that open the answer, and the next turn's prompt, which has others there, can still go on from it.
KV_MARGIN = 16
TILE = 32  # rows and columns of FP8 that share a scale


class _Tally:
    """Adds up the tensors of a part."""

    def __init__(self) -> None:
        self.weights = Weights()

    def fp8(self, rows: int, cols: int) -> None:
        """One byte a value, and one for each square tile's scale."""
        scales = -(-rows // TILE) * -(-cols // TILE)
        self._add(rows * cols + scales, rows * cols)

    def fp4(self, rows: int, cols: int) -> None:
        """Half a byte a value, and a one-byte scale for each 32 along a row."""
        self._add(rows * cols // 2 + rows * cols // 32, rows * cols)

    def bf16(self, *shape: int) -> None:
        """Two bytes a value."""
        self._add(2 * math.prod(shape), math.prod(shape))

    def fp32(self, *shape: int) -> None:
        """Four bytes a value."""
        self._add(4 * math.prod(shape), math.prod(shape))

    def _add(self, nbytes: int, parameters: int) -> None:
        self.weights += Weights(nbytes, parameters)


def _expert(tally: _Tally, width: int, hidden: int, matrix: Callable[[int, int], None]) -> Weights:
    """Gate, up and down of one expert."""
    for _ in range(2):
        matrix(width, hidden)
    matrix(hidden, width)
    return tally.weights


def _plain(*shape: int) -> Weights:
    """A bf16 tensor."""
    tally = _Tally()
    tally.bf16(*shape)
    return tally.weights


@dataclass(frozen=True)
class V41Dims:
    """V4.1: one shared key=value latent, windows, streams, grouped output; sources share their entries with
    later layers; Engram before some layers."""

    hidden: int
    layers: int
    heads: int
    head_dim: int
    q_lora: int
    o_groups: int
    o_lora: int
    experts: int
    width: int
    top_k: int
    index_heads: int
    index_dim: int
    index_topk: int
    ratios: tuple[int, ...]
    window: int = 128
    streams: int = 4
    vocab: int = 129280
    max_context: int = 1_048_576
    kv_sources: tuple[int, ...] = ()
    index_sources: tuple[int, ...] = ()
    engram_rows: tuple[tuple[int, int], ...] = ()  # (layer, rows)
    engram_columns: int = 24
    engram_dim: int = 256
    engram_ngram: int = 4
    rope_dim: int = 64
    has_image_bias: bool = True

    @property
    def activation_bytes(self) -> int:
        """Streams twice, queries and attention output, in float32."""
        return 4 * (2 * self.streams * self.hidden + 2 * self.heads * self.head_dim)

    @property
    def held_bytes(self) -> int:
        """Streams twice, what experts read, their outputs, one for each choice, and sums of these."""
        return 4 * self.hidden * (2 * self.streams + self.top_k + 4)


def v41_shape(name: str, d: V41Dims, kv_format: KvFormat = "float32") -> ModelShape:
    """A V4.1 model of these dimensions."""
    kv = v41_kv(d, kv_format)
    rows = dict(d.engram_rows)
    layers = []
    for n in range(d.layers):
        dense = _Tally()
        _latent_attention(dense, d)
        if n in d.kv_sources:
            dense.bf16(d.head_dim, d.hidden)
            if d.ratios[n] > 1:
                dense.bf16(d.head_dim, d.hidden)
            dense.bf16(d.head_dim)
            dense.bf16(d.index_dim, d.head_dim)
            dense.bf16(d.index_dim)
        if n in d.index_sources:
            dense.fp8(d.index_heads * d.index_dim, d.q_lora)
            dense.bf16(d.index_heads, d.hidden)
        dense.bf16(d.experts, d.hidden)
        dense.fp32(d.experts)
        if d.has_image_bias:
            dense.fp32(d.experts)
        table = None
        if n in rows:
            dense.fp8(d.hidden * (d.streams + 1), d.engram_columns * d.engram_dim)
            dense.fp32(2, d.streams, d.hidden)
            scales = d.engram_dim // 32
            table = Table(rows[n], d.engram_dim + scales, d.engram_columns, scales)
        layer = _moe_layer(dense, kv[n], d, table)
        launches = v41_launches(d, n, has_table=n in rows)
        layers.append(replace(layer, launches=launches, tail=v41_tail(d, n)))
    return _latent_model(name, d, layers)


def v41_launches(d: V41Dims, layer: int, *, has_table: bool) -> int:
    """Kernels that a recorded step launches for a layer on a GPU."""
    chooses = d.max_context // d.ratios[layer] if layer in d.index_sources else 0
    return gpu_launches(owns_entries=layer in d.kv_sources, chooses_among=chooses, has_table=has_table)


def v41_tail(d: V41Dims, layer: int) -> int | None:
    """How many tokens at a prompt's end a layer computes; None for all: see `V41Config.tail_of`. Entries that
    the last source makes of the others are little beside its attention and experts, and not counted."""
    last_source = max(d.kv_sources, default=-1)
    if layer < last_source or last_source == d.layers - 1:
        return None
    return d.window + (d.window - 1) * (d.layers - 1 - layer) + KV_MARGIN


def v41_kv(d: V41Dims, kv_format: KvFormat = "float32") -> tuple[KvShape, ...]:
    """What V4.1's layers keep and read; the sizes are those of the engine's SparseCache."""
    rows = v41_rows(kv_format, d.head_dim, d.rope_dim, d.index_dim)
    latent, entry = row_bytes(d.head_dim, rows.window), row_bytes(d.head_dim, rows.entries)
    index_key = row_bytes(d.index_dim, rows.index_keys)
    found = []
    for n in range(d.layers):
        source = max((s for s in d.kv_sources if s <= n), default=None) if d.ratios[n] else None
        is_source, scans = n in d.kv_sources, n in d.index_sources
        open_rows = d.ratios[n] - 1 + KV_MARGIN if is_source and d.ratios[n] > 1 else 0
        found.append(
            KvShape(
                fixed_bytes=latent * (d.window + KV_MARGIN) + KV_VALUE_BYTES * d.head_dim * 2 * open_rows,
                fixed_flops=4 * d.heads * d.head_dim * d.window,
                rows=(KeptRows(d.ratios[n], entry), KeptRows(d.ratios[n], index_key)) if is_source else (),
                seen_ratio=d.ratios[source] if source is not None else 0,
                scan_bytes=index_key if scans else 0,
                scan_flops=2 * d.index_heads * d.index_dim if scans else 0,
                selected=d.index_topk,
                selected_bytes=entry,
                selected_flops=4 * d.heads * d.head_dim,
            )
        )
    return tuple(found)


def v41_history_bytes(ngram: int) -> int:
    """What a sequence keeps of its last tokens for look-ups by n-grams of up to so many."""
    return TOKEN_KEY_BYTES * (ngram - 1 + KV_MARGIN)


def _latent_attention(dense: _Tally, d: V41Dims) -> None:
    """Projections, norms and stream mixes of a layer."""
    query = d.heads * d.head_dim
    dense.fp8(d.q_lora, d.hidden)
    dense.fp8(query, d.q_lora)
    dense.fp8(d.head_dim, d.hidden)
    dense.fp8(d.o_groups * d.o_lora, query // d.o_groups)
    dense.fp8(d.hidden, d.o_groups * d.o_lora)
    dense.bf16(d.q_lora + d.head_dim + 2 * d.hidden)
    mixes = (2 + d.streams) * d.streams
    dense.fp32(2 * (mixes * d.streams * d.hidden + mixes + 3) + d.heads)


def _moe_layer(dense: _Tally, kv: KvShape, d: V41Dims, table: Table | None) -> LayerShape:
    shared, routed = _Tally(), _Tally()
    return LayerShape(
        dense=dense.weights,
        kv=kv,
        shared=_expert(shared, d.width, d.hidden, shared.fp8),
        experts=d.experts,
        expert=_expert(routed, d.width, d.hidden, routed.fp4),
        table=table,
    )


def _latent_model(name: str, d: V41Dims, layers: Sequence[LayerShape]) -> ModelShape:
    return ModelShape(
        name=name,
        vocab_size=d.vocab,
        hidden=d.hidden,
        max_context=d.max_context,
        top_k=d.top_k,
        embedding=_plain(d.vocab, d.hidden),
        head=_plain(d.vocab, d.hidden) + _plain(d.hidden),
        layers=tuple(layers),
        activation_bytes=d.activation_bytes,
        held_bytes=d.held_bytes,
        history_bytes=v41_history_bytes(d.engram_ngram) if d.engram_rows else 0,
        streams=d.streams,
    )


V41_FLASH = V41Dims(
    hidden=5120, layers=40, heads=64, head_dim=512, q_lora=1280, o_groups=8, o_lora=1024,
    experts=384, width=2304, top_k=6, index_heads=32, index_dim=128, index_topk=512,
    ratios=(0, 0, *(2,) * 18, *(1,) * 20),
    kv_sources=(2, 8, 14, 20), index_sources=(2, 8, 14, 20, 24, 28, 32, 36),
    engram_rows=((1, 384_006_168), (14, 384_016_682)),
)  # fmt: skip

_BUILT_IN = {"deepseek-v4.1-flash": V41_FLASH}
NAMES = tuple(_BUILT_IN)


def built_in(name: str, kv_format: KvChoice = "float32") -> ModelShape:
    """The shape of a model known by name. Raises ConfigError listing the names."""
    if name not in _BUILT_IN:
        raise ConfigError(f"{name}: unknown model; known: {', '.join(NAMES)}")
    return v41_shape(name, _BUILT_IN[name], resolve(kv_format, V41_FORMATS, name))
