"""What the llama family promises, shown on a tiny model with random weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from engine.families.base import Batch, Trace
from engine.families.decoder.cache import DecoderCache
from engine.families.decoder.forward import Decoder
from engine.families.decoder.weights import AttentionWeights, MlpWeights
from engine.families.llama import FAMILY
from engine.families.registry import family_of
from engine.families.shapes import shape_of
from memory.checkpoint.checkpoint import Checkpoint
from memory.checkpoint.gguf_files import open_gguf
from memory.checkpoint.safetensors_files import open_safetensors
from memory.planner.budget import MemoryBudget
from quant.errors import BudgetError, CheckpointError, ConfigError
from quant.kernels.reference import ReferenceKernels
from quant.packed import PackedTensor
from tests.engine.families.tiny_llama import (
    CONTEXT,
    LAYERS,
    VOCAB,
    tiny_values,
    write_gguf,
    write_safetensors,
)

IDS = np.random.default_rng(3).integers(0, VOCAB, 40).tolist()


def load(checkpoint: Checkpoint) -> Decoder:
    model = family_of(checkpoint).load(checkpoint, ReferenceKernels(), MemoryBudget(1 << 30))
    assert isinstance(model, Decoder)
    return model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    return load(open_gguf(write_gguf(path, tiny_values(), "Q4_1")))


def whole(model: Decoder, ids: list[int]) -> torch.Tensor:
    """Logits of every position, the prompt taken at once."""
    return model.forward(Batch.of([(0, 0, ids)], all_logits=True), model.new_cache(1, CONTEXT))


def in_chunks(model: Decoder, ids: list[int], sizes: list[int]) -> torch.Tensor:
    cache = model.new_cache(1, CONTEXT)
    parts: list[torch.Tensor] = []
    start = 0
    while start < len(ids):
        size = sizes[len(parts) % len(sizes)]
        chunk = ids[start : start + size]
        parts.append(model.forward(Batch.of([(0, start, chunk)], all_logits=True), cache))
        start += len(chunk)
    return torch.cat(parts)


@settings(max_examples=15, deadline=None)
@given(sizes=st.lists(st.integers(1, 17), min_size=1, max_size=4))
def test_a_prompt_cut_into_chunks_gives_the_logits_of_the_whole(model: Decoder, sizes: list[int]) -> None:
    torch.testing.assert_close(in_chunks(model, IDS, sizes), whole(model, IDS), atol=2e-5, rtol=0)


def test_sequences_in_one_batch_get_the_logits_they_get_alone(model: Decoder) -> None:
    alone = [whole(model, ids) for ids in (IDS[:7], IDS[7:30], IDS[30:])]
    cache = model.new_cache(3, CONTEXT)
    model.forward(Batch.of([(2, 0, IDS[:5]), (0, 0, IDS[7:8])]), cache)

    mixed = model.forward(
        Batch.of([(0, 1, IDS[8:30]), (2, 5, IDS[5:6]), (1, 0, IDS[30:])], all_logits=True), cache
    )
    last = model.forward(Batch.of([(2, 6, IDS[6:7])]), cache)

    expected = torch.cat((alone[1][1:], alone[0][5:6], alone[2]))
    torch.testing.assert_close(mixed, expected, atol=2e-5, rtol=0)
    torch.testing.assert_close(last, alone[0][6:7], atol=2e-5, rtol=0)


def test_only_the_rows_asked_for_get_logits(model: Decoder) -> None:
    cache = model.new_cache(2, CONTEXT)
    batch = Batch.of([(0, 0, IDS[:5]), (1, 0, IDS[5:9])])

    logits = model.forward(batch, cache)

    assert logits.shape == (2, VOCAB)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits[0], whole(model, IDS[:5])[-1], atol=2e-5, rtol=0)


def test_a_reset_slot_forgets_its_sequence(model: Decoder) -> None:
    cache = model.new_cache(1, CONTEXT)
    model.forward(Batch.of([(0, 0, IDS)]), cache)
    assert cache.length(0) == len(IDS)

    cache.reset(0)

    assert cache.length(0) == 0
    again = model.forward(Batch.of([(0, 0, IDS[:6])]), cache)
    torch.testing.assert_close(again[0], whole(model, IDS[:6])[-1], atol=2e-5, rtol=0)


def test_more_tokens_than_the_cache_holds_are_refused_before_anything_is_stored(model: Decoder) -> None:
    cache = model.new_cache(1, 8)
    model.forward(Batch.of([(0, 0, IDS[:6])]), cache)

    with pytest.raises(BudgetError, match="9 tokens do not fit in a cache of 8"):
        model.forward(Batch.of([(0, 6, IDS[6:9])]), cache)

    assert cache.length(0) == 6


def test_a_segment_must_continue_its_slot(model: Decoder) -> None:
    with pytest.raises(ValueError, match="slot 0 holds 0 tokens, but the segment starts at 3"):
        model.forward(Batch.of([(0, 3, IDS[:2])]), model.new_cache(1, 8))


def test_cache_bytes_is_what_a_cache_allocates(model: Decoder) -> None:
    cache = model.new_cache(3, 17)

    assert isinstance(cache, DecoderCache)
    assert model.cache_bytes(3, 17) == cache.nbytes == 3 * 17 * LAYERS * 2 * 2 * 16 * 4


def test_a_trace_has_the_hidden_states_of_every_layer(model: Decoder) -> None:
    trace = Trace()

    model.forward(Batch.of([(0, 0, IDS[:3])]), model.new_cache(1, 8), trace)

    assert [trace.values[f"hidden.{n}"][0].shape for n in range(LAYERS)] == [(3, 64)] * LAYERS


def test_matrices_stay_packed(model: Decoder) -> None:
    weights, layer = model.weights, model.weights.layers[0]
    assert isinstance(layer.feed_forward, MlpWeights)
    assert isinstance(layer.attention, AttentionWeights)
    used = (weights.embed, layer.attention.q, layer.attention.o, layer.feed_forward.down)

    assert all(isinstance(weight, PackedTensor) for weight in used)
    assert weights.head is weights.embed


@pytest.mark.parametrize("is_tied", [True, False])
def test_safetensors_and_gguf_of_the_same_weights_agree(tmp_path: Path, is_tied: bool) -> None:
    values = tiny_values(is_tied=is_tied)
    from_gguf = load(open_gguf(write_gguf(tmp_path / "m.gguf", values, "F32")))
    from_directory = load(open_safetensors(write_safetensors(tmp_path / "m", values)))

    assert (from_gguf.weights.head is from_gguf.weights.embed) == is_tied
    torch.testing.assert_close(whole(from_directory, IDS), whole(from_gguf, IDS), atol=2e-5, rtol=0)
    assert from_directory.info.eos_token_ids == from_gguf.info.eos_token_ids == (1, 2)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_every_stored_type_computes_what_its_decoded_values_do(tmp_path: Path, kind: str) -> None:
    stored = load(open_gguf(write_gguf(tmp_path / "stored.gguf", tiny_values(), kind)))
    checkpoint = open_gguf(tmp_path / "stored.gguf")
    decoded = tiny_values()
    for name, entry in checkpoint.entries.items():
        if len(entry.shape) == 2:
            decoded[name] = _decoded(checkpoint, name)
    plain = load(open_gguf(write_gguf(tmp_path / "plain.gguf", decoded, "F32")))

    torch.testing.assert_close(whole(stored, IDS), whole(plain, IDS), atol=2e-5, rtol=0)


def _decoded(checkpoint: Checkpoint, name: str) -> np.ndarray:
    import gguf

    entry = checkpoint.entries[name]
    kind = gguf.GGMLQuantizationType[entry.dtype]
    raw = checkpoint.read(name).numpy().reshape(entry.shape[0], -1)
    if entry.dtype == "F16":
        return raw.view(np.float16).astype(np.float32)
    return gguf.quants.dequantize(raw, kind)


@pytest.mark.parametrize("is_tied", [True, False])
def test_weights_take_as_many_bytes_as_in_the_file(tmp_path: Path, is_tied: bool) -> None:
    checkpoint = open_gguf(write_gguf(tmp_path / "m.gguf", tiny_values(is_tied=is_tied), "Q4_0"))

    assert load(checkpoint).tier_bytes == {"dram": sum(e.nbytes for e in checkpoint.entries.values())}


def test_describe_counts_every_byte_of_the_file(tmp_path: Path) -> None:
    checkpoint = open_gguf(write_gguf(tmp_path / "m.gguf", tiny_values(is_tied=False), "Q8_0"))

    info, components = FAMILY.describe(checkpoint)

    assert (info.family, info.vocab_size, info.max_context, info.bos_token_id) == ("llama", VOCAB, CONTEXT, 0)
    assert sum(part.nbytes for part in components) == sum(e.nbytes for e in checkpoint.entries.values())
    assert {part.kind: part.format for part in components} == {
        "embedding": "q8_0",
        "head": "q8_0",
        "dense": "f32+q8_0",
    }


def test_buffers_that_every_reader_computes_for_itself_are_ignored(tmp_path: Path) -> None:
    plain = open_safetensors(write_safetensors(tmp_path / "plain", tiny_values()))
    path = write_safetensors(tmp_path / "old", tiny_values())
    buffers = {"model.rotary_emb.inv_freq": torch.ones(8)}
    for n in range(LAYERS):
        attention = f"model.layers.{n}.self_attn"
        buffers[f"{attention}.rotary_emb.inv_freq"] = torch.ones(8)
        buffers[f"{attention}.rotary_emb.cos_cached"] = torch.ones(1, 1, CONTEXT, 16)
        buffers[f"{attention}.bias"] = torch.ones(1, 1, CONTEXT, CONTEXT, dtype=torch.bool)
        buffers[f"{attention}.masked_bias"] = torch.tensor(-1e4)
    save_file(load_file(path / "model.safetensors") | buffers, path / "model.safetensors")
    old = open_safetensors(path)

    assert torch.equal(whole(load(old), IDS), whole(load(plain), IDS))
    assert load(old).tier_bytes == load(plain).tier_bytes
    assert FAMILY.describe(old)[1] == FAMILY.describe(plain)[1]
    assert replace(shape_of(old), name="plain") == shape_of(plain)


@pytest.mark.parametrize("name", ["q_proj.bias", "o_proj.bias", "rotary.inv_freq"])
def test_tensors_that_the_family_does_not_compute_are_refused(tmp_path: Path, name: str) -> None:
    path = write_safetensors(tmp_path / "m", tiny_values())
    extra = {f"model.layers.0.self_attn.{name}": torch.ones(8)}
    save_file(load_file(path / "model.safetensors") | extra, path / "model.safetensors")

    with pytest.raises(CheckpointError, match=f"unexpected tensor model.layers.0.self_attn.{name}"):
        load(open_safetensors(path))


@pytest.mark.parametrize("kept", [("embed",), ("head",), ("embed", "head")])
def test_tied_weights_are_found_under_either_name(tmp_path: Path, kept: tuple[str, ...]) -> None:
    plain = load(open_safetensors(write_safetensors(tmp_path / "plain", tiny_values())))
    path = write_safetensors(tmp_path / "m", tiny_values())
    tensors = load_file(path / "model.safetensors")
    names = {"embed": "model.embed_tokens.weight", "head": "lm_head.weight"}
    tied = tensors.pop(names["embed"])
    save_file(tensors | {names[role]: tied.clone() for role in kept}, path / "model.safetensors")
    checkpoint = open_safetensors(path)

    assert torch.equal(whole(load(checkpoint), IDS), whole(plain, IDS))
    assert sum(part.nbytes for part in FAMILY.describe(checkpoint)[1]) == shape_of(checkpoint).nbytes


def test_weights_that_should_be_tied_but_differ_are_both_used(tmp_path: Path) -> None:
    untied = tiny_values(is_tied=False)
    expected = load(open_safetensors(write_safetensors(tmp_path / "untied", untied)))
    path = write_safetensors(tmp_path / "m", untied, {"tie_word_embeddings": True})

    assert torch.equal(whole(load(open_safetensors(path)), IDS), whole(expected, IDS))


def test_everything_wrong_with_the_tensors_is_said_at_once(tmp_path: Path) -> None:
    values = tiny_values()
    del values["blk.1.ffn_up.weight"]
    values["blk.0.attn_k.weight"] = np.zeros((64, 64), dtype=np.float32)
    values["blk.0.attn_q.bias"] = np.zeros(64, dtype=np.float32)
    checkpoint = open_gguf(write_gguf(tmp_path / "m.gguf", values))

    with pytest.raises(CheckpointError) as caught:
        load(checkpoint)

    message = str(caught.value)
    assert "3 problem(s)" in message
    assert "missing tensor blk.1.ffn_up.weight [96, 64]" in message
    assert "blk.0.attn_k.weight: shape [64, 64], expected [32, 64]" in message
    assert "unexpected tensor blk.0.attn_q.bias [64]" in message


def test_a_model_larger_than_the_budget_is_refused(tmp_path: Path) -> None:
    checkpoint = open_gguf(write_gguf(tmp_path / "m.gguf", tiny_values()))

    with pytest.raises(BudgetError, match="bytes, but the memory budget is 1,000 bytes"):
        FAMILY.load(checkpoint, ReferenceKernels(), MemoryBudget(1000))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"llama.expert_count": 8}, "llama.expert_used_count is None, expected a positive number"),
        ({"llama.rope.dimension_count": 8}, "llama.rope.dimension_count is 8"),
        ({"llama.block_count": None}, "llama.block_count is None, expected a positive number"),
        ({"llama.block_count": "three"}, "llama.block_count is 'three', expected a positive number"),
        ({"llama.embedding_length": 2.5}, "llama.embedding_length is 2.5, expected an integer"),
        ({"llama.attention.head_count_kv": 3}, "4 query heads are not a multiple of 3 key-value heads"),
        ({"tokenizer.ggml.eos_token_id": "end"}, "tokenizer.ggml.eos_token_id is 'end'"),
    ],
)
def test_a_gguf_config_it_cannot_run_is_refused(
    tmp_path: Path, metadata: dict[str, object], message: str
) -> None:
    checkpoint = open_gguf(write_gguf(tmp_path / "m.gguf", tiny_values(), metadata=metadata))

    with pytest.raises(ConfigError, match=message):
        FAMILY.describe(checkpoint)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"attention_bias": True}, "attention_bias is True; the llama family supports only False"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_theta": 10**400}, "expected a positive number"),
        ({"num_hidden_layers": 2**40}, "no model has more than"),
        ({"vocab_size": None}, "vocab_size is None, expected a positive number"),
        ({"head_dim": 15}, "head_dim is 15, expected an even number"),
        ({"eos_token_id": ["end"]}, "eos_token_id is"),
    ],
)
def test_a_directory_config_it_cannot_run_is_refused(
    tmp_path: Path, config: dict[str, object], message: str
) -> None:
    checkpoint = open_safetensors(write_safetensors(tmp_path / "m", tiny_values(), config))

    with pytest.raises(ConfigError, match=message):
        FAMILY.describe(checkpoint)
