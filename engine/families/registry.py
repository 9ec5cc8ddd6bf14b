"""The registry: maps a checkpoint's model type to the family that runs it."""

from __future__ import annotations

from importlib import import_module

from engine.families.base import Family
from memory.checkpoint.checkpoint import Checkpoint
from quant.errors import ConfigError

# model type in config.json, or architecture in GGUF metadata -> module that holds `FAMILY`
FAMILIES = {
    "deepseek2": "engine.families.deepseek_v3",
    "deepseek32": "engine.families.deepseek_v32",
    "deepseek_v2": "engine.families.deepseek_v2",
    "deepseek_v3": "engine.families.deepseek_v3",
    "deepseek_v32": "engine.families.deepseek_v32",
    "deepseek_v4": "engine.families.deepseek_v4.family",
    "deepseek_v41": "engine.families.deepseek_v41.family",
    "deepseek_v41_text": "engine.families.deepseek_v41.family",
    "glm-dsa": "engine.families.glm_moe_dsa",
    "glm4_moe": "engine.families.glm4_moe",
    "glm_moe_dsa": "engine.families.glm_moe_dsa",
    "glm4moe": "engine.families.glm4_moe",
    "gpt-oss": "engine.families.gpt_oss",
    "gpt_oss": "engine.families.gpt_oss",
    "granitemoe": "engine.families.granitemoe",
    "kimi_k2": "engine.families.deepseek_v3",
    "llama": "engine.families.llama",
    "minimax-m2": "engine.families.minimax_m2",
    "minimax_m2": "engine.families.minimax_m2",
    "mistral": "engine.families.mistral",
    "mixtral": "engine.families.mixtral",
    "olmoe": "engine.families.olmoe",
    "qwen3": "engine.families.qwen3",
    "qwen3_5_moe": "engine.families.qwen3_5_moe",
    "qwen3_5_moe_text": "engine.families.qwen3_5_moe",
    "qwen3_moe": "engine.families.qwen3_moe",
    "qwen3_next": "engine.families.qwen3_next",
    "qwen3moe": "engine.families.qwen3_moe",
}


def family_of(checkpoint: Checkpoint) -> Family:
    """The family that runs `checkpoint`. Raises ConfigError for an unknown model type."""
    model_type = checkpoint.model_type
    if model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise ConfigError(f"{checkpoint.path}: model type {model_type!r} is not supported; known: {known}")
    family = import_module(FAMILIES[model_type]).FAMILY
    assert isinstance(family, Family)
    return family
