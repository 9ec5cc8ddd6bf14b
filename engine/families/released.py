"""Released configurations of decoders, to be planned without their checkpoints.

Each is what changes sizes in the config.json that lies beside the release's weights on the Hub, under the
names used there.
"""

from __future__ import annotations

from typing import Any

from engine.families.decoder.config_only import config_shape
from memory.planner.published import NAMES as HAND_WRITTEN
from memory.planner.published import built_in
from memory.planner.shape import ModelShape
from quant.errors import ConfigError
from quant.formats.kv_names import KvChoice

_QWEN3 = {
    "model_type": "qwen3_moe", "head_dim": 128, "num_key_value_heads": 4, "num_experts": 128,
    "num_experts_per_tok": 8, "norm_topk_prob": True, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
    "vocab_size": 151936, "max_position_embeddings": 40960, "tie_word_embeddings": False,
}  # fmt: skip
_MIXTRAL = {
    "model_type": "mixtral", "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2,
    "rms_norm_eps": 1e-5, "rope_theta": 1e6, "vocab_size": 32000, "tie_word_embeddings": False,
}  # fmt: skip
_GRANITE = {
    "model_type": "granitemoe", "num_key_value_heads": 8, "intermediate_size": 512, "num_experts_per_tok": 8,
    "attention_multiplier": 0.015625, "embedding_multiplier": 12.0, "residual_multiplier": 0.22,
    "rms_norm_eps": 1e-6, "rope_theta": 1.5e6, "vocab_size": 49155, "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
}  # fmt: skip
_GLM = {
    "model_type": "glm4_moe", "num_attention_heads": 96, "num_key_value_heads": 8, "head_dim": 128,
    "attention_bias": True, "partial_rotary_factor": 0.5, "num_experts_per_tok": 8, "n_shared_experts": 1,
    "n_group": 1, "topk_group": 1, "norm_topk_prob": True, "rms_norm_eps": 1e-5, "rope_theta": 1e6,
    "vocab_size": 151552, "max_position_embeddings": 131072, "tie_word_embeddings": False,
}  # fmt: skip
_GLM_355B = _GLM | {
    "hidden_size": 5120, "num_hidden_layers": 92, "intermediate_size": 12288, "first_k_dense_replace": 3,
    "n_routed_experts": 160, "moe_intermediate_size": 1536, "routed_scaling_factor": 2.5, "use_qk_norm": True,
}  # fmt: skip
_GPT_OSS = {
    "model_type": "gpt_oss", "hidden_size": 2880, "num_attention_heads": 64, "num_key_value_heads": 8,
    "head_dim": 64, "intermediate_size": 2880, "num_experts_per_tok": 4, "sliding_window": 128,
    "attention_bias": True, "rms_norm_eps": 1e-5, "rope_theta": 150000, "vocab_size": 201088,
    "max_position_embeddings": 131072, "tie_word_embeddings": False,
    "rope_scaling": {
        "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
        "original_max_position_embeddings": 4096,
    },
    "quantization_config": {"quant_method": "mxfp4"},
}  # fmt: skip
_DEEPSEEK_V3: dict[str, Any] = {
    "model_type": "deepseek_v3", "hidden_size": 7168, "num_hidden_layers": 61, "num_attention_heads": 128,
    "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "v_head_dim": 128, "intermediate_size": 18432, "moe_intermediate_size": 2048,
    "first_k_dense_replace": 3, "n_routed_experts": 256, "num_experts_per_tok": 8, "n_shared_experts": 1,
    "n_group": 8, "topk_group": 4, "topk_method": "noaux_tc", "scoring_func": "sigmoid",
    "norm_topk_prob": True, "routed_scaling_factor": 2.5, "num_nextn_predict_layers": 1,
    "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "vocab_size": 129280, "max_position_embeddings": 163840,
    "tie_word_embeddings": False,
    "rope_scaling": {
        "type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
    },
    "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
}  # fmt: skip
_GLM_5 = {
    "model_type": "glm_moe_dsa", "hidden_size": 6144, "num_hidden_layers": 78, "num_attention_heads": 64,
    "q_lora_rank": 2048, "kv_lora_rank": 512, "qk_nope_head_dim": 192, "qk_rope_head_dim": 64,
    "v_head_dim": 256, "index_n_heads": 32, "index_head_dim": 128, "index_topk": 2048,
    "intermediate_size": 12288, "moe_intermediate_size": 2048, "first_k_dense_replace": 3,
    "n_routed_experts": 256, "num_experts_per_tok": 8, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
    "topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True,
    "routed_scaling_factor": 2.5, "num_nextn_predict_layers": 1, "rms_norm_eps": 1e-5,
    "vocab_size": 154880, "max_position_embeddings": 202752, "tie_word_embeddings": False,
    "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
}  # fmt: skip
_KIMI_K2: dict[str, Any] = _DEEPSEEK_V3 | {
    "model_type": "kimi_k2", "num_attention_heads": 64, "first_k_dense_replace": 1, "n_routed_experts": 384,
    "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.827, "num_nextn_predict_layers": 0,
    "rope_theta": 50000.0, "vocab_size": 163840, "max_position_embeddings": 131072,
    "rope_scaling": {
        "type": "yarn", "factor": 32.0, "beta_fast": 1.0, "beta_slow": 1.0, "mscale": 1.0,
        "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096,
    },
}  # fmt: skip

_DEEPSEEK_V4 = {
    "model_type": "deepseek_v4", "attention_bias": False, "compress_rope_theta": 160000, "head_dim": 512,
    "hc_eps": 1e-6, "hc_mult": 4, "hc_sinkhorn_iters": 20, "hidden_act": "silu", "index_head_dim": 128,
    "index_n_heads": 64, "max_position_embeddings": 1048576, "n_shared_experts": 1, "norm_topk_prob": True,
    "num_experts_per_tok": 6, "num_hash_layers": 3, "num_key_value_heads": 1, "num_nextn_predict_layers": 1,
    "o_lora_rank": 1024, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-6, "rope_theta": 10000,
    "scoring_func": "sqrtsoftplus", "sliding_window": 128, "swiglu_limit": 10.0,
    "tie_word_embeddings": False, "topk_method": "noaux_tc", "vocab_size": 129280,
    "rope_scaling": {
        "type": "yarn", "factor": 16, "beta_fast": 32, "beta_slow": 1,
        "original_max_position_embeddings": 65536,
    },
    "quantization_config": {
        "quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0", "weight_block_size": [128, 128],
    },
}  # fmt: skip
_QWEN3_5 = {
    "model_type": "qwen3_5_moe_text", "head_dim": 256, "num_key_value_heads": 2, "attn_output_gate": True,
    "linear_num_key_heads": 16, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4, "full_attention_interval": 4, "rms_norm_eps": 1e-6, "vocab_size": 248320,
    "max_position_embeddings": 262144, "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25},
}  # fmt: skip

RELEASED: dict[str, dict[str, Any]] = {
    "deepseek-r1": _DEEPSEEK_V3,
    "deepseek-v2": {
        "model_type": "deepseek_v2", "hidden_size": 5120, "num_hidden_layers": 60, "num_attention_heads": 128,
        "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
        "v_head_dim": 128, "intermediate_size": 12288, "moe_intermediate_size": 1536,
        "first_k_dense_replace": 1, "n_routed_experts": 160, "num_experts_per_tok": 6, "n_shared_experts": 2,
        "n_group": 8, "topk_group": 3, "topk_method": "group_limited_greedy", "scoring_func": "softmax",
        "norm_topk_prob": False, "routed_scaling_factor": 16.0, "rms_norm_eps": 1e-6, "rope_theta": 10000,
        "vocab_size": 102400, "max_position_embeddings": 163840, "tie_word_embeddings": False,
        "rope_scaling": {
            "type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 0.707,
            "mscale_all_dim": 0.707, "original_max_position_embeddings": 4096,
        },
    },
    "deepseek-v2-lite": {
        "model_type": "deepseek_v2", "hidden_size": 2048, "num_hidden_layers": 27, "num_attention_heads": 16,
        "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "intermediate_size": 10944, "moe_intermediate_size": 1408, "first_k_dense_replace": 1,
        "n_routed_experts": 64, "num_experts_per_tok": 6, "n_shared_experts": 2, "topk_method": "greedy",
        "scoring_func": "softmax", "norm_topk_prob": False, "routed_scaling_factor": 1.0,
        "rms_norm_eps": 1e-6, "rope_theta": 10000, "vocab_size": 102400, "max_position_embeddings": 163840,
        "tie_word_embeddings": False,
        "rope_scaling": {
            "type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 0.707,
            "mscale_all_dim": 0.707, "original_max_position_embeddings": 4096,
        },
    },
    "deepseek-v3": _DEEPSEEK_V3,
    "deepseek-v3.1": _DEEPSEEK_V3,
    "deepseek-v3.2": _DEEPSEEK_V3 | {
        "model_type": "deepseek_v32", "index_n_heads": 64, "index_head_dim": 128, "index_topk": 2048,
        "quantization_config": _DEEPSEEK_V3["quantization_config"] | {"scale_fmt": "ue8m0"},
    },
    "deepseek-v4-flash": _DEEPSEEK_V4 | {
        "hidden_size": 4096, "num_hidden_layers": 43, "num_attention_heads": 64, "q_lora_rank": 1024,
        "o_groups": 8, "moe_intermediate_size": 2048, "n_routed_experts": 256, "routed_scaling_factor": 1.5,
        "index_topk": 512, "compress_ratios": [0, 0, *[4, 128] * 20, 4, 0],
    },
    "deepseek-v4-pro": _DEEPSEEK_V4 | {
        "hidden_size": 7168, "num_hidden_layers": 61, "num_attention_heads": 128, "q_lora_rank": 1536,
        "o_groups": 16, "moe_intermediate_size": 3072, "n_routed_experts": 384, "routed_scaling_factor": 2.5,
        "index_topk": 1024, "compress_ratios": [128, 128, *[4, 128] * 29, 4, 0],
    },
    "glm-4.5": _GLM_355B,
    "glm-4.5-air": _GLM | {
        "hidden_size": 4096, "num_hidden_layers": 46, "intermediate_size": 10944, "first_k_dense_replace": 1,
        "n_routed_experts": 128, "moe_intermediate_size": 1408, "routed_scaling_factor": 1.0,
        "use_qk_norm": False,
    },
    "glm-4.6": _GLM_355B | {"max_position_embeddings": 202752},
    "glm-4.7": _GLM_355B | {"max_position_embeddings": 202752},
    "glm-5": _GLM_5,
    "glm-5.2": _GLM_5 | {
        "index_topk_freq": 4, "index_skip_topk_offset": 3, "max_position_embeddings": 1048576,
        "rope_parameters": {"rope_theta": 8e6, "rope_type": "default"},
    },
    "gpt-oss-120b": _GPT_OSS | {"num_hidden_layers": 36, "num_local_experts": 128},
    "gpt-oss-20b": _GPT_OSS | {"num_hidden_layers": 24, "num_local_experts": 32},
    "granite-3.1-1b-a400m": _GRANITE | {
        "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "num_local_experts": 32,
        "logits_scaling": 6.0,
    },
    "granite-3.1-3b-a800m": _GRANITE | {
        "hidden_size": 1536, "num_hidden_layers": 32, "num_attention_heads": 24, "num_local_experts": 40,
        "logits_scaling": 6.0,
    },
    "kimi-k2": _KIMI_K2,
    "kimi-k2-thinking": _KIMI_K2 | {
        "max_position_embeddings": 262144,
        "rope_scaling": _KIMI_K2["rope_scaling"] | {"factor": 64.0},
        "quantization_config": {"quant_method": "compressed-tensors"},
    },
    "minimax-m2": {
        "model_type": "minimax_m2", "hidden_size": 3072, "num_hidden_layers": 62, "num_attention_heads": 48,
        "num_key_value_heads": 8, "head_dim": 128, "rotary_dim": 64, "intermediate_size": 1536,
        "num_local_experts": 256, "num_experts_per_tok": 8, "scoring_func": "sigmoid", "use_qk_norm": True,
        "use_routing_bias": True, "rms_norm_eps": 1e-6, "rope_theta": 5e6, "vocab_size": 200064,
        "max_position_embeddings": 196608, "tie_word_embeddings": False,
        "quantization_config": {
            "quant_method": "fp8", "weight_block_size": [128, 128],
            "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"],
        },
    },
    "mixtral-8x22b": _MIXTRAL | {
        "hidden_size": 6144, "num_hidden_layers": 56, "num_attention_heads": 48, "intermediate_size": 16384,
        "max_position_embeddings": 65536,
    },
    "mixtral-8x7b": _MIXTRAL | {
        "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 14336,
        "max_position_embeddings": 32768,
    },
    "moonlight-16b-a3b": {
        "model_type": "deepseek_v3", "hidden_size": 2048, "num_hidden_layers": 27, "num_attention_heads": 16,
        "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "intermediate_size": 11264, "moe_intermediate_size": 1408, "first_k_dense_replace": 1,
        "n_routed_experts": 64, "num_experts_per_tok": 6, "n_shared_experts": 2, "n_group": 1,
        "topk_group": 1, "topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True,
        "routed_scaling_factor": 2.446, "rms_norm_eps": 1e-5, "rope_theta": 50000.0, "vocab_size": 163840,
        "max_position_embeddings": 8192, "tie_word_embeddings": False,
    },
    "olmoe-1b-7b": {
        "model_type": "olmoe", "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 16,
        "num_key_value_heads": 16, "intermediate_size": 1024, "num_experts": 64, "num_experts_per_tok": 8,
        "norm_topk_prob": False, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "vocab_size": 50304,
        "max_position_embeddings": 4096, "tie_word_embeddings": False,
    },
    "qwen3-235b-a22b": _QWEN3 | {
        "hidden_size": 4096, "num_hidden_layers": 94, "num_attention_heads": 64, "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
    },
    "qwen3-30b-a3b": _QWEN3 | {
        "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32, "intermediate_size": 6144,
        "moe_intermediate_size": 768,
    },
    "qwen3-next-80b-a3b": {
        "model_type": "qwen3_next", "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 16,
        "num_key_value_heads": 2, "head_dim": 256, "partial_rotary_factor": 0.25, "linear_num_key_heads": 16,
        "linear_num_value_heads": 32, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4, "full_attention_interval": 4, "intermediate_size": 5120,
        "num_experts": 512, "num_experts_per_tok": 10, "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512, "norm_topk_prob": True, "rms_norm_eps": 1e-6,
        "rope_theta": 1e7, "vocab_size": 151936, "max_position_embeddings": 262144,
        "tie_word_embeddings": False,
    },
    "qwen3.5-122b-a10b": _QWEN3_5 | {
        "hidden_size": 3072, "num_hidden_layers": 48, "num_attention_heads": 32, "linear_num_value_heads": 64,
        "num_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 1024,
        "shared_expert_intermediate_size": 1024,
    },
    "qwen3.5-35b-a3b": _QWEN3_5 | {
        "hidden_size": 2048, "num_hidden_layers": 40, "num_attention_heads": 16, "linear_num_value_heads": 32,
        "num_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
    },
    "qwen3.5-397b-a17b": _QWEN3_5 | {
        "hidden_size": 4096, "num_hidden_layers": 60, "num_attention_heads": 32, "linear_num_value_heads": 64,
        "num_experts": 512, "num_experts_per_tok": 10, "moe_intermediate_size": 1024,
        "shared_expert_intermediate_size": 1024,
    },
    "qwen3-coder-480b-a35b": _QWEN3 | {
        "hidden_size": 6144, "num_hidden_layers": 62, "num_attention_heads": 96, "num_key_value_heads": 8,
        "intermediate_size": 8192, "moe_intermediate_size": 2560, "num_experts": 160, "rope_theta": 1e7,
        "max_position_embeddings": 262144,
    },
}  # fmt: skip

NAMES = tuple(sorted((*HAND_WRITTEN, *RELEASED)))


def released_shape(name: str, experts: str | None = None, kv_format: KvChoice = "float32") -> ModelShape:
    """The shape of a model known by name, its routed experts in the format `experts` where one is named.

    Raises ConfigError listing the names of models that are known, or for experts that cannot be encoded.
    """
    if name in RELEASED:
        return config_shape(RELEASED[name], name, experts, kv_format)
    shape = built_in(name, kv_format)
    if experts is not None:
        raise ConfigError(f"--experts {experts}: {name} is planned as released only; leave it out")
    return shape
