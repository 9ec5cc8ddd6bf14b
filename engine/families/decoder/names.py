"""Tensor names by role, as safetensors of the Hub have them.

A matrix's or a norm's name ends in `.weight`; its bias, where it has one, in `.bias` instead. Families
replace what they name differently.
"""

from __future__ import annotations

LAYER = "model.layers.{layer}."

HF_NAMES = {
    "embed": "model.embed_tokens.weight",
    "norm": "model.norm.weight",
    "head": "lm_head.weight",
    "attn_norm": f"{LAYER}input_layernorm.weight",
    "q": f"{LAYER}self_attn.q_proj.weight",
    "k": f"{LAYER}self_attn.k_proj.weight",
    "v": f"{LAYER}self_attn.v_proj.weight",
    "o": f"{LAYER}self_attn.o_proj.weight",
    "q_norm": f"{LAYER}self_attn.q_norm.weight",
    "k_norm": f"{LAYER}self_attn.k_norm.weight",
    "sinks": f"{LAYER}self_attn.sinks",
    "q_a": f"{LAYER}self_attn.q_a_proj.weight",
    "q_a_norm": f"{LAYER}self_attn.q_a_layernorm.weight",
    "q_b": f"{LAYER}self_attn.q_b_proj.weight",
    "kv_a": f"{LAYER}self_attn.kv_a_proj_with_mqa.weight",
    "kv_a_norm": f"{LAYER}self_attn.kv_a_layernorm.weight",
    "kv_b": f"{LAYER}self_attn.kv_b_proj.weight",
    "index_q": f"{LAYER}self_attn.indexer.wq_b.weight",
    "index_k": f"{LAYER}self_attn.indexer.wk.weight",
    "index_k_norm": f"{LAYER}self_attn.indexer.k_norm.weight",
    "index_weights": f"{LAYER}self_attn.indexer.weights_proj.weight",
    "ffn_norm": f"{LAYER}post_attention_layernorm.weight",
    "gate": f"{LAYER}mlp.gate_proj.weight",
    "up": f"{LAYER}mlp.up_proj.weight",
    "down": f"{LAYER}mlp.down_proj.weight",
    "router": f"{LAYER}mlp.gate.weight",
    "choice_bias": f"{LAYER}mlp.gate.e_score_correction_bias",
    "expert_gate": f"{LAYER}mlp.experts.{{expert}}.gate_proj.weight",
    "expert_up": f"{LAYER}mlp.experts.{{expert}}.up_proj.weight",
    "expert_down": f"{LAYER}mlp.experts.{{expert}}.down_proj.weight",
    "shared_gate": f"{LAYER}mlp.shared_experts.gate_proj.weight",
    "shared_up": f"{LAYER}mlp.shared_experts.up_proj.weight",
    "shared_down": f"{LAYER}mlp.shared_experts.down_proj.weight",
}

# Of experts that were encoded again after the release, whatever their names were.
REENCODED = {
    "expert_gate": "reencoded.{layer}.{expert}.gate.weight",
    "expert_up": "reencoded.{layer}.{expert}.up.weight",
    "expert_down": "reencoded.{layer}.{expert}.down.weight",
}

# Mixtral's names for router and experts, which others took over.
BLOCK = f"{LAYER}block_sparse_moe."
W123_NAMES = {
    **HF_NAMES,
    "router": f"{BLOCK}gate.weight",
    "choice_bias": f"{BLOCK}e_score_correction_bias",
    "expert_gate": f"{BLOCK}experts.{{expert}}.w1.weight",
    "expert_up": f"{BLOCK}experts.{{expert}}.w3.weight",
    "expert_down": f"{BLOCK}experts.{{expert}}.w2.weight",
}


def draft_layers(first: int, count: int) -> str:
    """A regular expression of the tensors of the draft layers that follow the last layer."""
    return "|".join(rf"model\.layers\.{n}\..*" for n in range(first, first + count))
