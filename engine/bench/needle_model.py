"""A DeepSeek-V4.1 that answers from anywhere in a million tokens: not trained, its weights are set by hand.

It continues a token with what followed the token after it, earlier: after "... a b c ... a" comes "c". Its
layers do that in steps, each with one of the architecture's mechanisms:

0  window      every token attends to the one before it, by rotary angles alone, and keeps its code
1  source      entries of all later layers: the code of the token before is the key, the token's own the
               value. The indexer scores all of them for the current token's code; attention reads the best
               and finds `b`; the best blocks become candidates
2  reindex     the indexer looks for `b` among the candidates alone; attention reads `c`, and the head says it

Codes are random directions, so that every format of the KV cache rounds them. A needle is found only where
windows, index keys, candidates and chosen entries all do what they should, and then at any depth: the model
has no idea of distance. Experts add nothing that float32 could hold.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from engine.families.deepseek_v41.config import parse_config
from engine.families.deepseek_v41.tensors import expected_tensors
from engine.layers.rope import inverse_frequencies
from engine.synthetic import MODEL_TYPE, ROPE_THETA, in_released_dialect, shards_of, tokenizer_texts
from engine.tokenizer.synthetic import synthetic_tokenizer
from memory.checkpoint.checkpoint import Checkpoint
from memory.checkpoint.entries import TensorSpec
from memory.checkpoint.random_files import (
    Codes,
    Fill,
    Given,
    PowerScales,
    RandomCheckpoint,
    write_checkpoint,
)

CONTEXT = 1 << 20
VOCABULARY = 4096
CODE = 64  # channels of a token's code
ROTARY = 64
WINDOW = 16
BLOCK = 64  # entries of a block of candidates
STREAMS = 2
# What the first residual stream holds, CODE channels each.
OWN, BEFORE, LINK, ANSWER, ONES = range(5)
# What a latent holds.
KEY, VALUE, TURNED = range(3)

MATCH = 6.0  # of queries for a key: it outweighs all others that are chosen
NEXT = 128.0  # of queries for a place: neighbours differ by little
FAR = 30.0  # a sigmoid or a softmax of it is 1, of its negative 0
NOTHING = PowerScales(-120)  # of routed experts
# What each layer asks with, and which part of the stream takes what it finds.
ASKS = (ONES, OWN, LINK)
FINDS = (BEFORE, LINK, ANSWER)

HEADS, INDEX_HEADS = 2, 4

CONFIG: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 5 * CODE,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": HEADS,
    "head_dim": 2 * CODE + ROTARY,
    "qk_rope_head_dim": ROTARY,
    "q_lora_rank": CODE,
    "o_groups": 1,
    "o_lora_rank": CODE,
    "n_routed_experts": 1,
    "num_experts_per_tok": 1,
    "sliding_window": WINDOW,
    "compress_ratios": [0, 1, 1],
    "kv_source_layer_ids": [1],
    "index_source_layer_ids": [1, 2],
    "candidate_source_layer_id": 1,
    "candidate_topk_blocks": 64,
    "candidate_block_size": BLOCK,
    "index_n_heads": INDEX_HEADS,
    "index_head_dim": CODE + ROTARY,
    "index_topk": 64,
    "max_position_embeddings": CONTEXT,
    "hc_mult": STREAMS,
    "engram_layer_ids": [],
    "engram_num_embeddings": [],
}


def write_needle_model(out: Path) -> None:
    """Write it as the new directory `out`: 5 MB. Raises as `write_checkpoint`."""
    raw = in_released_dialect(CONFIG)
    codes = torch.randn(VOCABULARY, CODE, generator=torch.Generator().manual_seed(0))
    codes = F.normalize(codes, dim=1) * CODE**0.5

    def filled(name: str, dtype: str, shape: tuple[int, ...]) -> Fill:
        if dtype == "I8":
            return Codes()
        return NOTHING if dtype == "F8_E8M0" else Given(_content(name, shape, codes))

    plan = RandomCheckpoint(
        shards_of(_tensors(raw), filled), raw, tokenizer_texts(synthetic_tokenizer(VOCABULARY))
    )
    write_checkpoint(plan, out, lambda done, of: None)


def _tensors(raw: dict[str, Any]) -> dict[str, TensorSpec]:
    """What the family expects, but for routed experts in bfloat16."""
    specs = expected_tensors(parse_config(raw), Checkpoint(Path("needle"), MODEL_TYPE, raw, {}, []))
    dense = {name.removesuffix(".weight") for name, spec in specs.items() if "F8_E4M3" in spec.dtypes}
    plain = {f"{name}.weight": TensorSpec(specs[f"{name}.weight"].shape, ("BF16",)) for name in dense}
    return {
        name: plain.get(name, spec)
        for name, spec in specs.items()
        if name.removesuffix(".scale") not in dense
    }


def _content(name: str, shape: tuple[int, ...], codes: torch.Tensor) -> torch.Tensor:
    """The values of one tensor; zeros where nothing is said."""
    layer = int(name.split(".")[1]) if name.startswith("layers.") else 0
    part = name.removeprefix(f"layers.{layer}.").removesuffix(".weight")
    found = torch.zeros(shape)
    one = torch.eye(CODE)
    if part.endswith("norm"):
        found += 1
    elif part.endswith("_base"):
        found.copy_(_only_the_first_stream())
    elif part == "attn.attn_sink":
        found -= FAR
    elif part == "embed":
        found[:, _at(OWN)], found[:, _at(ONES)] = codes, 1
    elif part == "head":
        found[:, _at(ANSWER)] = codes
    elif part == "attn.wq_a":
        found[:, _at(ASKS[layer])] = one
    elif part == "attn.wq_b":
        for head in found.view(HEADS, -1, CODE):
            if layer == 0:
                head[_at(TURNED), 0] = NEXT * _one_place_back()
            else:
                head[_at(KEY)] = MATCH * one
    elif part == "attn.wkv":
        found[_at(TURNED), ONES * CODE] = _upright()
        if layer == 0:
            found[_at(VALUE), _at(OWN)] = one
    elif part == "attn.wo_a":
        for head in range(HEADS):
            found.view(CODE, HEADS, -1)[:, head, _at(VALUE)] = one / HEADS
    elif part == "attn.wo_b":
        found[_at(FINDS[layer])] = one
    elif part == "attn.compressor.wkv":
        found[_at(KEY), _at(BEFORE)], found[_at(VALUE), _at(OWN)] = one, one
    elif part == "attn.indexer.wk":
        found[_at(KEY), _at(KEY)] = one
    elif part == "attn.indexer.wq_b":
        for head in found.view(INDEX_HEADS, -1, CODE):
            head[_at(KEY)] = one
    elif part == "attn.indexer.weights_proj":
        found[:, ONES * CODE] = 1
    return found


def _at(number: int) -> slice:
    return slice(number * CODE, (number + 1) * CODE)


def _only_the_first_stream() -> torch.Tensor:
    """Bases by which a sublayer reads the first stream alone and writes to it alone."""
    first = torch.full((STREAMS,), -FAR)
    first[0] = FAR
    takes = first.clamp(max=0)  # twice a sigmoid
    return torch.cat([first, takes, torch.where(torch.eye(STREAMS) > 0, FAR, -FAR).flatten()])


def _upright() -> torch.Tensor:
    """The rotary channels of a latent: pairs that point one way."""
    return torch.tensor([1.0, 0.0]).repeat(ROTARY // 2)


def _one_place_back() -> torch.Tensor:
    """Rotary channels of a query: pairs that, turned, point where those of the token before do."""
    angles = -inverse_frequencies(ROTARY, ROPE_THETA)
    return torch.stack([angles.cos(), angles.sin()], dim=1).flatten().float()
