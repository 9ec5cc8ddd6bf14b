"""Qwen3.5's mixtures of experts: as Qwen3-Next, with projections apart and fused experts; text only.

Keys of config.json: https://huggingface.co/Qwen/Qwen3.5-35B-A3B and `transformers`' Qwen3_5MoeConfig. The
tower for images is met and ignored, as draft layers are.
"""

from __future__ import annotations

from dataclasses import replace

from engine.families.decoder.description import Description, Layer
from engine.families.decoder.family import DecoderFamily
from engine.families.decoder.hf import describe, keys_of
from engine.families.decoder.keys import HARMLESS, Keys
from engine.families.decoder.names import LAYER
from engine.families.qwen3_next import DRAFT, delta_net_of, experts_of, layers_of
from engine.families.qwen3_next import NAMES as NEXT_NAMES
from memory.checkpoint.checkpoint import Checkpoint

NAME = "qwen3_5_moe"
NAMES = {
    **NEXT_NAMES,
    "experts_up": f"{LAYER}mlp.experts.gate_up_proj",
    "experts_down": f"{LAYER}mlp.experts.down_proj",
}
# Of the whole model: what images and videos are made tokens of.
OF_IMAGES = (
    "vision_config",
    "image_token_id",
    "video_token_id",
    "vision_start_token_id",
    "vision_end_token_id",
    "language_model_only",
)


def describe_qwen3_5_moe(checkpoint: Checkpoint) -> Description:
    """The description of a checkpoint. Raises ConfigError naming everything that is not computed."""
    read, names, ignored = _text_keys(checkpoint), NAMES, DRAFT
    if "text_config" in checkpoint.config:
        names = {role: name.replace("model.", "model.language_model.", 1) for role, name in NAMES.items()}
        ignored += r"|model\.visual\..*"
    read.only("attn_output_gate", True, None)
    read.only("mamba_ssm_dtype", "float32", None)
    read.only("norm_topk_prob", True, None)
    for draft in ("mtp_num_hidden_layers", "mtp_use_dedicated_embeddings"):
        read.raw(draft)
    # Packed releases have every expert by itself.
    is_fused = names["expert_gate"].format(layer=0, expert=0).removesuffix(".weight") not in {
        name.rpartition(".")[0] for name in checkpoint.entries
    }
    experts = replace(experts_of(read), layout="halves" if is_fused else "each")
    layers = [Layer(mixer, experts) for mixer in layers_of(read, delta_net_of(read))]
    return describe(read, checkpoint, layers, names, ignored=ignored, norm_offset=1.0)


def _text_keys(checkpoint: Checkpoint) -> Keys:
    """Lookups in the part of the config that is about text, which is all of it in a model of text alone."""
    read = keys_of(checkpoint, NAME)
    if "text_config" not in checkpoint.config:
        return read
    text = read.raw("text_config")
    if not isinstance(text, dict):
        read.refuse("text_config", text, "expected an object")
        text = {}
    for key in OF_IMAGES:
        read.raw(key)
    inner = read.inner("text_config", text)
    is_tied = read.flag("tie_word_embeddings")
    if "tie_word_embeddings" in text and text["tie_word_embeddings"] is not is_tied:
        read.problems.append("tie_word_embeddings and text_config.tie_word_embeddings disagree")
    read.check_unknown(HARMLESS)
    return inner


FAMILY = DecoderFamily(NAME, describe_qwen3_5_moe)
