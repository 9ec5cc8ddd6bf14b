"""The tensors that a decoder reads: each with its name, its shape and the part of the model it belongs to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from engine.families.decoder.description import (
    Attention,
    DeltaNet,
    Description,
    Experts,
    Indexer,
    Mixer,
    Mla,
    Mlp,
)
from engine.families.decoder.names import REENCODED

Part = Literal["embedding", "head", "dense", "router", "shared", "experts"]


@dataclass(frozen=True)
class Use:
    """A tensor. Matrices (and stacks of them) may be packed, others are floats.

    layer: None for what is outside of the layers; is_decoded: a matrix that is held as plain numbers
    """

    name: str
    shape: tuple[int, ...]
    part: Part
    layer: int | None = None
    is_matrix: bool = True
    is_decoded: bool = False


def bias_of(name: str) -> str:
    """The name of the bias beside a matrix, or of the biases beside a stack of them."""
    return f"{name.removesuffix('.weight')}.bias" if name.endswith(".weight") else f"{name}_bias"


def uses(description: Description) -> Iterator[Use]:
    """Every tensor that text generation needs, those of one layer after the other."""
    d = description
    if d.is_first or d.is_tied:
        yield Use(d.names["embed"], (d.vocab_size, d.hidden), "embedding")
    for number in range(len(d.layers)):
        yield from layer_uses(d, number)
    if d.is_last:
        yield Use(d.names["norm"], (d.hidden,), "head", is_matrix=False)
    if d.has_rope_factors:
        yield Use(d.names["rope_factors"], (d.rope.dims // 2,), "head", is_matrix=False)
    if d.is_last and not d.is_tied:
        yield Use(d.names["head"], (d.vocab_size, d.hidden), "head")


def layer_uses(description: Description, number: int) -> Iterator[Use]:
    """Those of one layer."""
    layer = description.layers[number]
    yield from _Layer(description, number).uses(layer.attention, layer.feed_forward)


@dataclass(frozen=True)
class _Layer:
    d: Description
    number: int

    def uses(self, attention: Mixer, feed_forward: Mlp | Experts) -> Iterator[Use]:
        yield self.floats("attn_norm", self.d.hidden)
        if isinstance(attention, Mla):
            yield from self.mla(attention)
        elif isinstance(attention, DeltaNet):
            yield from self.delta_net(attention)
        else:
            yield from self.attention(attention)
        yield self.floats("ffn_norm", self.d.hidden)
        if isinstance(feed_forward, Mlp):
            yield from self.mlp("", feed_forward.width, "dense")
        else:
            yield from self.experts(feed_forward)

    def attention(self, a: Attention) -> Iterator[Use]:
        hidden, queries, keys = self.d.hidden, a.heads * a.head_dim, a.kv_heads * a.head_dim
        for role, rows in (("q", 2 * queries if a.has_gate else queries), ("k", keys), ("v", keys)):
            yield from self.matrix(role, rows, hidden, "dense", has_bias=a.has_qkv_bias)
        yield from self.matrix("o", hidden, queries, "dense", has_bias=a.has_out_bias)
        if a.qk_norm != "none":
            yield self.floats("q_norm", a.head_dim if a.qk_norm == "head" else queries)
            yield self.floats("k_norm", a.head_dim if a.qk_norm == "head" else keys)
        if a.has_sinks:
            yield self.floats("sinks", a.heads)

    def mla(self, a: Mla) -> Iterator[Use]:
        hidden, queries = self.d.hidden, a.heads * a.head_dim
        if a.q_rank is None:
            yield from self.matrix("q", queries, hidden, "dense")
        else:
            yield from self.matrix("q_a", a.q_rank, hidden, "dense")
            yield self.floats("q_a_norm", a.q_rank)
            yield from self.matrix("q_b", queries, a.q_rank, "dense")
        yield from self.matrix("kv_a", a.row_dim, hidden, "dense")
        yield self.floats("kv_a_norm", a.rank)
        if a.is_split:
            yield self.decoded("k_b", a.heads, a.rank, a.plain_dim)
            yield self.decoded("v_b", a.heads, a.value_dim, a.rank)
        else:
            yield self.decoded("kv_b", a.heads * (a.plain_dim + a.value_dim), a.rank)
        yield from self.matrix("o", hidden, a.heads * a.value_dim, "dense")
        if a.own_indexer is not None and a.q_rank is not None:
            yield from self.indexer(a.own_indexer, a.q_rank)

    def indexer(self, a: Indexer, q_rank: int) -> Iterator[Use]:
        yield from self.matrix("index_q", a.heads * a.dim, q_rank, "dense")
        yield from self.matrix("index_k", a.dim, self.d.hidden, "dense")
        yield self.floats("index_k_norm", a.dim)
        yield self.floats("index_k_norm", a.dim, is_bias=True)
        yield from self.matrix("index_weights", a.heads, self.d.hidden, "dense")

    def mlp(self, prefix: str, width: int, part: Part) -> Iterator[Use]:
        yield from self.matrix(f"{prefix}gate", width, self.d.hidden, part)
        yield from self.matrix(f"{prefix}up", width, self.d.hidden, part)
        yield from self.matrix(f"{prefix}down", self.d.hidden, width, part)

    def delta_net(self, a: DeltaNet) -> Iterator[Use]:
        hidden, heads, width = self.d.hidden, a.value_heads, a.value_width
        together = (("in_qkvz", a.channels + width), ("in_ba", 2 * heads))
        apart = (("in_qkv", a.channels), ("in_z", width), ("in_b", heads), ("in_a", heads))
        for role, rows in together if a.is_grouped else apart:
            yield from self.matrix(role, rows, hidden, "dense")
        yield self.floats("conv", a.channels, 1, a.taps)
        yield self.floats("decay_rate", heads)
        yield self.floats("decay_bias", heads)
        yield self.floats("delta_norm", a.value_dim)
        yield from self.matrix("delta_out", hidden, width, "dense")

    def experts(self, e: Experts) -> Iterator[Use]:
        count, width = e.router.experts, e.width
        yield from self.matrix("router", count, self.d.hidden, "router", has_bias=e.router.has_bias)
        if e.router.has_choice_bias:
            yield self.floats("choice_bias", count, part="router")
        if self.d.is_reencoded:
            for expert in range(count):
                for role, rows, cols in self._three(width):
                    name = REENCODED[role].format(layer=self.number, expert=expert)
                    yield Use(name, (rows, cols), "experts", self.number)
        elif e.layout == "each":
            for expert in range(count):
                for role, rows, cols in self._three(width):
                    yield from self.matrix(role, rows, cols, "experts", expert)
        elif e.layout == "stacked":
            for role, rows, cols in self._three(width):
                yield Use(self.name(role), (count, rows, cols), "experts", self.number)
        else:
            for role, rows, cols in self._two(width):
                yield Use(self.name(role), (count, rows, cols), "experts", self.number)
        if e.has_biases:
            assert e.layout != "each"
            roles = self._three(width) if e.layout == "stacked" else self._two(width)
            for role, rows, _ in roles:
                yield self.floats(role, count, rows, part="router", is_bias=True)
        if e.shared is not None:
            yield from self.mlp("shared_", e.shared.width, "shared")
        if e.has_shared_gate:
            yield from self.matrix("shared_share", 1, self.d.hidden, "router")

    def _three(self, width: int) -> tuple[tuple[str, int, int], ...]:
        hidden = self.d.hidden
        return (
            ("expert_gate", width, hidden),
            ("expert_up", width, hidden),
            ("expert_down", hidden, width),
        )

    def _two(self, width: int) -> tuple[tuple[str, int, int], ...]:
        return (("experts_up", 2 * width, self.d.hidden), ("experts_down", self.d.hidden, width))

    def name(self, role: str, expert: int = -1) -> str:
        return self.d.names[role].format(layer=self.number, expert=expert)

    def floats(self, role: str, *shape: int, part: Part = "dense", is_bias: bool = False) -> Use:
        name = bias_of(self.name(role)) if is_bias else self.name(role)
        return Use(name, shape, part, self.number, is_matrix=False)

    def decoded(self, role: str, *shape: int) -> Use:
        return Use(self.name(role), shape, "dense", self.number, is_decoded=True)

    def matrix(
        self, role: str, rows: int, cols: int, part: Part, expert: int = -1, *, has_bias: bool = False
    ) -> Iterator[Use]:
        name = self.name(role, expert)
        yield Use(name, (rows, cols), part, self.number)
        if has_bias:
            yield Use(bias_of(name), (rows,), part, self.number, is_matrix=False)
