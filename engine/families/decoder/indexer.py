"""The indexer of sparse attention: what a config.json says of it, and what it computes of a token.

DeepSeek-V3.2-Exp's report, section 2.1. Keys: https://huggingface.co/deepseek-ai/DeepSeek-V3.2 and
`transformers`' DeepseekV32Config and GlmMoeDsaConfig.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import torch

from engine.families.decoder.description import Indexer, Layer, Mla, Mlp
from engine.families.decoder.keys import Keys
from engine.families.decoder.weights import IndexerWeights
from engine.layers.operations import Operations, Value


def with_indexer(read: Keys, attention: Mla, *, is_interleaved: bool) -> Mla:
    """The attention with the indexer that a config.json describes.

    is_interleaved  whether the channels that turn are pairs side by side, where the config does not say
    """
    is_interleaved = read.flag("indexer_rope_interleave", default=is_interleaved)
    indexer = Indexer(
        heads=read.count("index_n_heads"),
        dim=read.count("index_head_dim"),
        top_k=read.count("index_topk"),
        rope=replace(attention.rope, pairs="adjacent" if is_interleaved else "half"),
    )
    if indexer.dim < attention.rope.dims:
        read.refuse(
            "index_head_dim", indexer.dim, f"expected at least qk_rope_head_dim, {attention.rope.dims}"
        )
    if attention.q_rank is None:
        read.refuse("q_lora_rank", None, "expected a number: the indexer's queries are made of that latent")
    return replace(attention, indexer=indexer)


def with_gguf_indexer(read: Keys, attention: Mla, *, is_interleaved: bool) -> Mla:
    """The attention with the indexer that GGUF metadata describes. is_interleaved: by architecture."""
    indexer = Indexer(
        heads=read.count("attention.indexer.head_count"),
        dim=read.count("attention.indexer.key_length"),
        top_k=read.count("attention.indexer.top_k"),
        rope=replace(attention.rope, pairs="adjacent" if is_interleaved else "half"),
        eps=read.number("attention.layer_norm_epsilon", 1e-6),
    )
    if indexer.dim < attention.rope.dims:
        read.refuse("attention.indexer.key_length", indexer.dim, f"expected at least {attention.rope.dims}")
    if attention.q_rank is None:
        read.refuse("attention.q_lora_rank", None, "expected a number: index queries are made of that latent")
    return replace(attention, indexer=indexer)


def sharing(layers: Sequence[Layer], is_shared: Sequence[bool]) -> list[Layer]:
    """Layers, those of which that share a choice without indexers of their own."""
    found = []
    for layer, shares in zip(layers, is_shared, strict=True):
        assert isinstance(layer.attention, Mla)
        assert layer.attention.indexer is not None
        indexer = replace(layer.attention.indexer, is_shared=shares)
        found.append(replace(layer, attention=replace(layer.attention, indexer=indexer)))
    return found


def check_layer_types(read: Keys, layers: Sequence[Layer]) -> None:
    """Refuse lists of layers' kinds that say something else than what the other keys do."""
    said = {
        "mlp_layer_types": ["dense" if isinstance(layer.feed_forward, Mlp) else "sparse" for layer in layers],
        "layer_types": ["indexed_attention"] * len(layers),
    }
    for key, expected in said.items():
        if read.raw(key) not in (None, expected):
            read.refuse(key, read.raw(key), f"expected {len(layers)} as the other keys say")


def queries_and_keys(
    ops: Operations[Value], a: Indexer, w: IndexerWeights, x: Value, of_queries: Value
) -> tuple[Value, Value, Value]:
    """Index queries `[tokens, heads * dim]`, weights `[tokens, heads]` and keys `[tokens, dim]` of normed x
    `[tokens, hidden]` and the latent of its queries `[tokens, q_rank]`."""
    (queries,) = ops.linears(of_queries, w.q)
    keys, weights = ops.linears(x, w.k, w.weights)
    keys = ops.add_bias(
        ops.norm(ops.batched_linear(keys, _centre(a.dim, w.k_norm.device)), w.k_norm, a.eps), w.k_bias
    )
    weights = ops.scale(weights, (a.heads * a.dim) ** -0.5)
    return ops.rotate(queries, a.heads), weights, ops.rotate(keys, 1)


@cache
def _centre(dim: int, device: torch.device) -> torch.Tensor:
    """What subtracts the mean of a row's channels as a product, `[1, dim, dim]`: before an RMSNorm and a bias
    it makes a LayerNorm."""
    return (torch.eye(dim, device=device) - 1 / dim).unsqueeze(0)
