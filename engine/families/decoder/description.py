"""What a decoder is: its layers, sizes and tensor names, as frozen values.

A family makes a `Description` once, from config.json or from GGUF metadata; the forward, the cache, the
loader and the planner read it and know no family. Choices that no description has are refused while it is
made.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from engine.families.decoder.rope import Rope
from quant.kernels.layers import RoutingRule

# How the routed experts of a layer lie in the checkpoint:
#   each         gate, up and down of every expert are tensors of their own
#   stacked      one tensor with all gates `[experts, width, hidden]`, one with all ups, one with all downs
#   halves       one tensor `[experts, 2 * width, hidden]` with gates and then ups, one with all downs
#   interleaved  the same, but gates are its even rows and ups its odd ones
Layout = Literal["each", "stacked", "halves", "interleaved"]


@dataclass(frozen=True)
class Attention:
    """Grouped-query attention.

    scale          of the scores; None: head_dim ** -0.5
    has_qkv_bias, has_out_bias  biases of the projections
    qk_norm        RMS norm of queries and keys before rotation: of each head, or of the whole projection
    clip           queries, keys and values are cut to this absolute value, after their norms
    window         tokens that a token sees, itself among them; None: all before it
    has_sinks      each head's softmax has one more term, a learned logit without a value
    has_gate       heads' outputs are multiplied by the sigmoid of gates, whose rows are behind those of each
                   head's queries
    """

    heads: int
    kv_heads: int
    head_dim: int
    rope: Rope
    scale: float | None = None
    has_qkv_bias: bool = False
    has_out_bias: bool = False
    qk_norm: Literal["none", "head", "whole"] = "none"
    clip: float | None = None
    window: int | None = None
    has_sinks: bool = False
    has_gate: bool = False


@dataclass(frozen=True)
class Indexer:
    """The "lightning indexer" (DeepSeek-V3.2-Exp's report, section 2.1): which tokens a token attends to.

    It has queries of its own, made of the latent that attention makes its queries of, and one key for all of
    them. A token sees the `top_k` tokens that score best: the sum over heads of weight * max(query . key, 0).

    heads, dim     of its queries (index_n_heads, index_head_dim)
    top_k          tokens that are chosen (index_topk)
    rope           of queries and keys: their first `dims` channels turn, as fast as those of attention
    is_shared      the layer has none, and attends to what the last indexer before it has chosen
    eps            of the keys' norm, whatever that of other norms is
    """

    heads: int
    dim: int
    top_k: int
    rope: Rope
    is_shared: bool = False
    eps: float = 1e-6


@dataclass(frozen=True)
class Mla:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

    A token has one latent, of which every head makes its keys and values by matrices of its own, and one
    rotated part of keys that all heads share. Only these two are kept. A head's queries are brought into the
    latent's space and its values out of it, which is the same as bringing all latents to the head.

    rank           channels of the latent (kv_lora_rank)
    q_rank         of the queries' latent (q_lora_rank); None: they are made of the hidden state
    plain_dim      channels of a head's queries and keys that do not turn (qk_nope_head_dim)
    value_dim      of its values (v_head_dim)
    rope           its `dims` are the channels that turn, behind the plain ones (qk_rope_head_dim)
    scale          of the scores
    is_split       the file has two matrices for each head, of keys `[rank, plain_dim]` and of values
                   `[value_dim, rank]`, not one for all
    eps            of the latents' norms, whatever that of other norms is
    indexer        chooses the tokens that are seen; None: all before it
    """

    heads: int
    rank: int
    q_rank: int | None
    plain_dim: int
    value_dim: int
    rope: Rope
    scale: float
    is_split: bool = False
    eps: float = 1e-6
    indexer: Indexer | None = None

    @property
    def own_indexer(self) -> Indexer | None:
        """The indexer, if this layer has it."""
        return None if self.indexer is None or self.indexer.is_shared else self.indexer

    @property
    def head_dim(self) -> int:
        """Channels of a head's queries and keys."""
        return self.plain_dim + self.rope.dims

    @property
    def row_dim(self) -> int:
        """Channels that are kept of a token; so many do queries have in the latent's space."""
        return self.rank + self.rope.dims


@dataclass(frozen=True)
class DeltaNet:
    """Gated DeltaNet (arXiv 2412.06464): heads with a state of fixed size instead of keys and values.

    Queries, keys and values go through a short convolution; the state forgets, and is corrected by each
    token's value. Heads' outputs are normed by themselves and gated.

    key_heads, key_dim  of queries and keys; each such head serves as many consecutive value heads
    taps           tokens that the convolution sees, the token itself among them
    is_grouped     the file has the rows of queries, keys, values and gates of one key head together, and so
                   those of decays and shares; else each by itself
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    taps: int
    is_grouped: bool = False

    @property
    def value_width(self) -> int:
        """Channels of all values."""
        return self.value_heads * self.value_dim

    @property
    def channels(self) -> int:
        """Channels that are convolved: of queries, keys and values."""
        return 2 * self.key_heads * self.key_dim + self.value_width


Mixer = Attention | Mla | DeltaNet  # of a sequence's tokens with each other


@dataclass(frozen=True)
class Activation:
    """What a feed-forward network does between its matrices: gate * sigmoid(alpha * gate) * (up + shift).

    limit   gate is cut above, up at both sides
    """

    limit: float = float("inf")
    alpha: float = 1.0
    shift: float = 0.0


SILU = Activation()


@dataclass(frozen=True)
class Groups:
    """Experts in `count` groups of consecutive ones; only those of the `kept` best can be chosen.

    A group is as good as the sum of its `best` highest scores.
    """

    count: int
    kept: int
    best: int


@dataclass(frozen=True)
class Router:
    """Which experts a token uses, and with which weights.

    score              of all logits; `chosen softmax`: softmax over the chosen logits alone
    has_bias           a bias of the logits
    has_choice_bias    added to the scores for the choice, not for the weights
    is_renormalised    weights are divided by their sum, plus `epsilon`
    factor             that weights are multiplied by
    """

    experts: int
    top_k: int
    score: Literal["softmax", "sigmoid", "chosen softmax"]
    has_bias: bool = False
    has_choice_bias: bool = False
    groups: Groups | None = None
    is_renormalised: bool = False
    epsilon: float = 0.0
    factor: float = 1.0

    @property
    def rule(self) -> RoutingRule:
        """What kernels need to know of it."""
        groups = None if self.groups is None else (self.groups.count, self.groups.kept, self.groups.best)
        return RoutingRule(self.top_k, self.score, groups, self.is_renormalised, self.epsilon, self.factor)


@dataclass(frozen=True)
class Mlp:
    """A gated feed-forward network that every token uses."""

    width: int
    activation: Activation = SILU


@dataclass(frozen=True)
class Experts:
    """A router, its experts, and the network beside them that every token uses, if there is one.

    has_biases     of every expert's three matrices
    has_shared_gate  the shared network's output is multiplied by the sigmoid of a row times the input
    """

    router: Router
    width: int
    layout: Layout
    activation: Activation = SILU
    has_biases: bool = False
    shared: Mlp | None = None
    has_shared_gate: bool = False


@dataclass(frozen=True)
class Layer:
    """One layer."""

    attention: Mixer
    feed_forward: Mlp | Experts


@dataclass(frozen=True)
class Description:
    """A whole decoder.

    embedding_factor, residual_factor, logits_factor  what the embedding, every sublayer's output and the
                   logits are multiplied by
    norm_offset    added to the weights of all norms but DeltaNet's own
    is_tied        the head is the embedding
    has_rope_factors  a tensor says what each rotary pair's frequency is divided by
    is_reencoded   matrices of routed experts are not those of the checkpoint's own files, however they lie
                   there, but tensors of their own: REENCODED in engine/families/decoder/names.py
    is_first, is_last  of parts of a model: with its embedding, with its head
    names          role -> tensor name, with {layer} and {expert}; NAMES in engine/families/decoder/names.py
    ignored        tensors of the file that text generation does not use
    """

    hidden: int
    vocab_size: int
    max_context: int
    eps: float
    layers: tuple[Layer, ...]
    names: Mapping[str, str]
    ignored: re.Pattern[str] | None = None
    embedding_factor: float = 1.0
    residual_factor: float = 1.0
    logits_factor: float = 1.0
    norm_offset: float = 0.0
    is_tied: bool = False
    has_rope_factors: bool = False
    is_reencoded: bool = False
    is_first: bool = True
    is_last: bool = True
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = field(default=())

    @cached_property
    def rope(self) -> Rope:
        """The rotary embeddings of the layers that have them, which are alike."""
        return next(
            layer.attention.rope for layer in self.layers if not isinstance(layer.attention, DeltaNet)
        )

    @cached_property
    def expert_layers(self) -> tuple[int, ...]:
        """The layers that have routed experts."""
        return tuple(n for n, layer in enumerate(self.layers) if isinstance(layer.feed_forward, Experts))

    @cached_property
    def experts(self) -> Experts | None:
        """The experts of the layers that have them, which are alike; None where none has."""
        found = [layer.feed_forward for layer in self.layers if isinstance(layer.feed_forward, Experts)]
        return found[0] if found else None
