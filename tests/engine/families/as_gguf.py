"""Golden checkpoints as GGUF files, laid out as llama.cpp's converter does it, in float32.

Tensor names come from `gguf`'s tables, keys from its writer; which of them an architecture has, and which
rows the converter permutes, was read in llama.cpp. Nothing is shared with the families that read the files.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.constants import MODEL_ARCH, ExpertGatingFuncType
from safetensors.torch import load_file

# model type -> architecture
ARCHITECTURES = {
    "deepseek_v32": MODEL_ARCH.GLM_DSA,  # whose tensors are named alike; `gguf` has no table for it
    "glm4_moe": MODEL_ARCH.GLM4_MOE,
    "glm_moe_dsa": MODEL_ARCH.GLM_DSA,
    "granitemoe": MODEL_ARCH.GRANITE_MOE,
    "minimax_m2": MODEL_ARCH.MINIMAXM2,
    "mixtral": MODEL_ARCH.LLAMA,
    "olmoe": MODEL_ARCH.OLMOE,
}
LATENT = ("deepseek_v32", "glm_moe_dsa")
PERMUTED = ("granitemoe", "mixtral")  # rows of queries and keys, so that a pair's are neighbours
EXPERT = re.compile(r"(model\.layers\.\d+\.(?:mlp|block_sparse_moe)\.experts)\.(\d+)\.(\w+)\.weight")
TILE = 128


def write_as_gguf(source: Path, file: Path) -> Path:
    """The checkpoint in `source` as the GGUF file `file`."""
    config: dict[str, Any] = json.loads((source / "config.json").read_text())
    kind = config["model_type"]
    architecture = "deepseek32" if kind == "deepseek_v32" else gguf.MODEL_ARCH_NAMES[ARCHITECTURES[kind]]
    writer = gguf.GGUFWriter(file, architecture)
    _add_keys(writer, config)
    _add_vocabulary(writer, config["vocab_size"])
    for name, values in _tensors(source, config):
        writer.add_tensor(name, np.ascontiguousarray(values.float().numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _add_keys(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    kind = config["model_type"]
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim", config["hidden_size"] // heads)
    drafts = config.get("num_nextn_predict_layers", 0) if kind.startswith("glm") else 0
    writer.add_block_count(config["num_hidden_layers"] + drafts)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(1 if kind in LATENT else config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base((config.get("rope_parameters") or config)["rope_theta"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    experts = ("num_experts", "num_local_experts", "n_routed_experts")
    writer.add_expert_count(next(config[key] for key in experts if key in config))
    if kind in LATENT:
        _add_latent_keys(writer, config)
    elif "head_dim" in config:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if kind in PERMUTED:
        writer.add_vocab_size(config["vocab_size"])
        writer.add_rope_dimension_count(head_dim)
    if kind == "granitemoe":
        writer.add_attention_scale(config["attention_multiplier"])
        writer.add_embedding_scale(config["embedding_multiplier"])
        writer.add_residual_scale(config["residual_multiplier"])
        writer.add_logit_scale(config["logits_scaling"])
    if kind == "minimax_m2":
        writer.add_expert_gating_func(ExpertGatingFuncType.SIGMOID)
        writer.add_expert_feed_forward_length(config["intermediate_size"])
        writer.add_rope_dimension_count(config["rotary_dim"])
    if kind == "glm4_moe":
        writer.add_rope_dimension_count(int(head_dim * config["partial_rotary_factor"]))
    if kind == "glm4_moe" or kind in LATENT:
        writer.add_expert_gating_func(ExpertGatingFuncType.SIGMOID)
        writer.add_expert_group_count(config["n_group"])
        writer.add_expert_group_used_count(config["topk_group"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
        writer.add_expert_shared_count(config["n_shared_experts"])
        writer.add_leading_dense_block_count(config["first_k_dense_replace"])
        writer.add_expert_weights_scale(config["routed_scaling_factor"])
        writer.add_expert_weights_norm(config["norm_topk_prob"])
        writer.add_nextn_predict_layers(drafts)


def _add_latent_keys(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    rank, turning = config["kv_lora_rank"], config["qk_rope_head_dim"]
    writer.add_vocab_size(config["vocab_size"])
    writer.add_q_lora_rank(config["q_lora_rank"])
    writer.add_kv_lora_rank(rank)
    writer.add_key_length(rank + turning)
    writer.add_value_length(rank)
    writer.add_key_length_mla(config["qk_nope_head_dim"] + turning)
    writer.add_value_length_mla(config["v_head_dim"])
    writer.add_rope_dimension_count(turning)
    writer.add_indexer_head_count(config["index_n_heads"])
    writer.add_indexer_key_length(config["index_head_dim"])
    writer.add_indexer_top_k(config["index_topk"])
    if "indexer_types" in config:
        has_indexer = [kind == "full" for kind in config["indexer_types"]]
        writer.add_array("glm-dsa.attention.indexer.types", has_indexer)
    if "rope_scaling" in config:
        scaling = config["rope_scaling"]
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(scaling["factor"])
        writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_log_mul(0.1 * scaling["mscale_all_dim"])


def _add_vocabulary(writer: gguf.GGUFWriter, size: int) -> None:
    """Any tokens, so that llama.cpp loads the file: only their numbers are used."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"t{number}" for number in range(size)])
    writer.add_token_types([gguf.TokenType.NORMAL] * size)
    writer.add_token_merges(["t 1"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)


def _tensors(source: Path, config: dict[str, Any]) -> list[tuple[str, torch.Tensor]]:
    stored: dict[str, torch.Tensor] = {}
    for file in sorted(source.glob("model-*.safetensors")):
        stored |= load_file(file)
    found: dict[str, torch.Tensor] = {}
    stacks: dict[str, dict[int, torch.Tensor]] = defaultdict(dict)
    for name, values in stored.items():
        if name.endswith("_scale_inv"):
            continue
        values = _plain(values, stored.get(f"{name}_scale_inv"))
        if expert := EXPERT.fullmatch(name):
            stacks[f"{expert[1]}.{expert[3]}.weight"][int(expert[2])] = values
        elif name.endswith("input_linear.weight"):
            gate, up = values.chunk(2, dim=1)
            found[name.replace("input_linear", "experts.w1")] = gate
            found[name.replace("input_linear", "experts.w3")] = up
        elif name.endswith("kv_b_proj.weight"):
            heads, plain = config["num_attention_heads"], config["qk_nope_head_dim"]
            both = values.view(heads, plain + config["v_head_dim"], -1)
            found[name.replace("kv_b_proj", "k_b_proj")] = both[:, :plain].transpose(1, 2)
            found[name.replace("kv_b_proj", "v_b_proj")] = both[:, plain:]
        else:
            found[name] = values
    for name, stack in stacks.items():
        found[name] = torch.stack([stack[number] for number in sorted(stack)])
    if config.get("tie_word_embeddings"):
        found.pop("lm_head.weight", None)
    if config["model_type"] in PERMUTED:
        for name in found:
            for part, heads in (("q", "num_attention_heads"), ("k", "num_key_value_heads")):
                if name.endswith(f"{part}_proj.weight"):
                    found[name] = _permuted(found[name], config[heads])
    layers = config["num_hidden_layers"] + config.get("num_nextn_predict_layers", 0)
    names = gguf.get_tensor_name_map(ARCHITECTURES[config["model_type"]], layers)
    renamed: list[tuple[str, torch.Tensor]] = []
    for name, values in found.items():
        written = names.get_name(
            name.replace("e_score_correction_bias", "e_score_correction.bias"), (".weight", ".bias")
        )
        assert written is not None, name
        renamed.append((written, values))
    return renamed


def _permuted(rows: torch.Tensor, heads: int) -> torch.Tensor:
    return rows.view(heads, 2, -1, rows.shape[1]).transpose(1, 2).reshape(rows.shape)


def _plain(values: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    if scales is None:
        return values.float()
    tall = scales.float().repeat_interleave(TILE, 0)[: values.shape[0]]
    return values.float() * tall.repeat_interleave(TILE, 1)[:, : values.shape[1]]
