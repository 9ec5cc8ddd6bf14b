"""The demonstration model's shape, as config.json says it (spec section 2, released dialect)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers

from engine.layers.engram_hash import build_token_map, table_primes
from prompts import BOS, EOS, PAD, VOCABULARY

# Six layers show every kind of attention:
#   0 window only, 1 full (ratio 2), 2 reuses 1's selection,
#   3 full (ratio 1) and candidate source, 4 reuses 3's selection, 5 reindex inside the candidates.
TEXT_CONFIG: dict[str, Any] = {
    "model_type": "deepseek_v41_text",
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 6,
    "num_nextn_predict_layers": 0,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "qk_rope_head_dim": 32,
    "q_lora_rank": 128,
    "o_groups": 2,
    "o_lora_rank": 64,
    "rms_norm_eps": 1e-20,
    "n_routed_experts": 24,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "scoring_func": "sqrtsoftplus",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
    "swiglu_limit": 10.0,
    "hidden_act": "silu",
    "sliding_window": 128,
    "compress_ratios": [0, 2, 2, 1, 1, 1],
    "kv_source_layer_ids": [1, 3],
    "index_source_layer_ids": [1, 3, 5],
    "candidate_source_layer_id": 3,
    "candidate_topk_blocks": 32,
    "candidate_block_size": 4,
    "index_n_heads": 16,
    "index_head_dim": 32,
    "index_topk": 64,
    "rope_theta": 10000.0,
    "compress_rope_theta": 160000.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 16.0,
        "beta_fast": 32,
        "beta_slow": 1,
        "original_max_position_embeddings": 65536,
    },
    "max_position_embeddings": 2048,
    "hc_mult": 2,
    "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-6,
    "engram_layer_ids": [1, 4],
    "engram_max_ngram_size": 3,
    "engram_vocab_size": 40960,
    "engram_n_heads": 4,
    "engram_head_dim": 32,
    "tie_word_embeddings": False,
}


def config_for(tokenizer_file: Path) -> dict[str, Any]:
    """config.json of the demonstration model with this tokenizer."""
    tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_file))
    text = dict(TEXT_CONFIG)
    orders = text["engram_max_ngram_size"] - 1
    primes = table_primes(
        len(text["engram_layer_ids"]), orders, text["engram_n_heads"], text["engram_vocab_size"]
    )
    text |= {
        "bos_token_id": tokenizer.token_to_id(BOS),
        "eos_token_id": tokenizer.token_to_id(EOS),
        "engram_pad_token_id": tokenizer.token_to_id(PAD),
        "engram_compressed_vocab_size": int(build_token_map(tokenizer, text["vocab_size"]).max()) + 1,
        "engram_num_embeddings": [sum(sizes) for sizes in primes],
    }
    return {
        "architectures": ["DeepseekV41ForCausalLM"],
        "model_type": "deepseek_v41",
        "dtype": "bfloat16",
        # Too small to think: a request that wants a thought must say so.
        "default_thinking_mode": False,
        "quantization_config": {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "weight_block_size": [32, 32],
            "scale_fmt": "ue8m0",
            "expert_dtype": "fp4",
        },
        "text_config": text,
    }
