"""A tiny Llama with random weights, as a GGUF file and as a safetensors directory of the same values."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import save_file

HIDDEN, LAYERS, HEADS, KV_HEADS, WIDTH, VOCAB, CONTEXT = 64, 3, 4, 2, 96, 80, 64
HEAD_DIM = HIDDEN // HEADS
MATRICES = {
    "attn_q": (HIDDEN, HIDDEN),
    "attn_k": (KV_HEADS * HEAD_DIM, HIDDEN),
    "attn_v": (KV_HEADS * HEAD_DIM, HIDDEN),
    "attn_output": (HIDDEN, HIDDEN),
    "ffn_gate": (WIDTH, HIDDEN),
    "ffn_up": (WIDTH, HIDDEN),
    "ffn_down": (HIDDEN, WIDTH),
}
HF_PARTS = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
Values = dict[str, np.ndarray]


def tiny_values(*, is_tied: bool = True) -> Values:
    """GGUF tensor names -> float32 values."""
    rng = np.random.default_rng(5)
    values = {"token_embd.weight": rng.normal(size=(VOCAB, HIDDEN)), "output_norm.weight": np.ones(HIDDEN)}
    if not is_tied:
        values["output.weight"] = rng.normal(size=(VOCAB, HIDDEN)) / 8
    for n in range(LAYERS):
        for norm in ("attn_norm", "ffn_norm"):
            values[f"blk.{n}.{norm}.weight"] = rng.uniform(0.5, 1.5, HIDDEN)
        for part, shape in MATRICES.items():
            values[f"blk.{n}.{part}.weight"] = rng.normal(size=shape) / np.sqrt(shape[1])
    return {name: value.astype(np.float32) for name, value in values.items()}


def write_gguf(
    path: Path,
    values: Values,
    matrices: str = "F32",
    metadata: Mapping[str, object] | None = None,
    max_tensors: int = 0,
) -> Path:
    """A GGUF file with matrices of GGUF type `matrices`; `metadata` adds keys or, with None, drops them.

    With max_tensors, parts of it with at most so many tensors each.
    """
    keys: dict[str, object] = {
        "llama.block_count": LAYERS,
        "llama.context_length": CONTEXT,
        "llama.embedding_length": HIDDEN,
        "llama.feed_forward_length": WIDTH,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 10000.0,
        "llama.vocab_size": VOCAB,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.eot_token_id": 2,
        **(metadata or {}),
    }
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=max_tensors)
    for key, value in keys.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
    for name, array in values.items():
        kind = gguf.GGMLQuantizationType[matrices if array.ndim == 2 else "F32"]
        writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_safetensors(
    path: Path, values: Values, config: Mapping[str, object] | None = None, dtype: torch.dtype = torch.float32
) -> Path:
    """The directory that `transformers` would have written for the same model."""
    path.mkdir()
    keys: dict[str, object] = {
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "vocab_size": VOCAB,
        "hidden_act": "silu",
        "bos_token_id": 0,
        "eos_token_id": [1, 2],
        "tie_word_embeddings": "output.weight" not in values,
        **(config or {}),
    }
    (path / "config.json").write_text(json.dumps(keys))
    tensors = {}
    for name, value in values.items():
        if name.split(".")[-2] in ("attn_q", "attn_k"):
            # GGUF keeps rotary pairs side by side, transformers half a head apart.
            value = value.reshape(-1, HEAD_DIM // 2, 2, HIDDEN).swapaxes(1, 2).reshape(value.shape)
        tensors[_hf_name(name)] = torch.from_numpy(value.copy()).to(dtype)
    save_file(tensors, path / "model.safetensors")
    return path


def _hf_name(name: str) -> str:
    parts = name.split(".")
    if parts[0] == "blk":
        return f"model.layers.{parts[1]}.{HF_PARTS[parts[2]]}.weight"
    return {
        "token_embd": "model.embed_tokens.weight",
        "output_norm": "model.norm.weight",
        "output": "lm_head.weight",
    }[parts[0]]
