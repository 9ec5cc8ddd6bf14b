"""Shapes read from headers agree with those computed from dimensions, and with the engine's caches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.cache.sparse import CacheShape
from engine.families.deepseek_v41.config import parse_config
from engine.families.loader import open_checkpoint
from engine.families.registry import family_of
from engine.families.shapes import shape_of
from memory.planner.published import KV_MARGIN, V41Dims, v41_shape
from tests.conftest import golden_path
from tests.engine.families.tiny_llama import CONTEXT, HEAD_DIM, KV_HEADS, LAYERS, tiny_values, write_gguf


def dimensions(path: Path) -> V41Dims:
    checkpoint = open_checkpoint(path)
    c = parse_config(checkpoint.config)
    return V41Dims(
        hidden=c.hidden_size, layers=c.num_hidden_layers, heads=c.num_attention_heads, head_dim=c.head_dim,
        q_lora=c.q_lora_rank, o_groups=c.o_groups, o_lora=c.o_lora_rank, experts=c.n_routed_experts,
        width=c.moe_intermediate_size, top_k=c.num_experts_per_tok, index_heads=c.index_n_heads,
        index_dim=c.index_head_dim, index_topk=c.index_topk, ratios=c.compress_ratios[: c.num_hidden_layers],
        window=c.sliding_window, streams=c.hc_mult, vocab=c.vocab_size,
        max_context=c.max_position_embeddings, kv_sources=c.kv_source_layer_ids,
        index_sources=c.index_source_layer_ids,
        engram_rows=tuple(zip(c.engram_layer_ids, c.engram_num_embeddings, strict=True)),
        engram_columns=(c.engram_max_ngram_size - 1) * c.engram_n_heads, engram_dim=c.engram_head_dim,
        engram_ngram=c.engram_max_ngram_size,
        has_image_bias=any(name.endswith("bias_vl") for name in checkpoint.entries),
    )  # fmt: skip


@pytest.mark.parametrize("name", ["v41-a", "v41-c"])
def test_headers_weigh_what_the_dimensions_say(name: str) -> None:
    path = golden_path(name)
    read, computed = shape_of(open_checkpoint(path)), v41_shape(name, dimensions(path))
    assert read == computed


@pytest.mark.parametrize("name", ["v41-a", "v41-c"])
def test_every_byte_that_text_needs_is_in_the_shape(name: str) -> None:
    path = golden_path(name)
    _, components = family_of(open_checkpoint(path)).describe(open_checkpoint(path))
    assert shape_of(open_checkpoint(path)).nbytes == sum(component.nbytes for component in components)


def test_planned_kv_is_what_the_engine_allocates() -> None:
    path = golden_path("v41-c")
    c = parse_config(open_checkpoint(path).config)
    sources = {layer: c.compress_ratios[layer] for layer in c.kv_source_layer_ids}
    cache = CacheShape(
        layers=c.num_hidden_layers,
        window=c.sliding_window,
        head_dim=c.head_dim,
        index_dim=c.index_head_dim,
        sources=sources,
        history=c.engram_max_ngram_size - 1,
        history_pad=0,
        margin=KV_MARGIN,
        devices=(torch.device("cpu"),) * c.num_hidden_layers,
    )
    assert shape_of(open_checkpoint(path)).kv_bytes(300, 2) == cache.nbytes(slots=2, capacity=300)


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_llama_file_is_planned_with_all_its_bytes(tmp_path: Path, is_tied: bool) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_values(is_tied=is_tied))
    shape = shape_of(open_checkpoint(path))
    assert shape.nbytes == sum(entry.nbytes for entry in open_checkpoint(path).entries.values())
    assert (shape.embedding.nbytes == 0) == is_tied
    assert shape.kv_bytes(CONTEXT, 1) == 2 * LAYERS * 4 * KV_HEADS * HEAD_DIM * CONTEXT
