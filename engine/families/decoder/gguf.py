"""What families read alike from GGUF metadata, whose keys begin with the architecture.

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; tensor names: `gguf`'s table of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from engine.families.decoder.description import Attention, Description, Experts, Layer, Mla, Mlp, Router
from engine.families.decoder.hf import MOST_LAYERS
from engine.families.decoder.keys import Keys
from engine.families.decoder.plausible import problems_of
from engine.families.decoder.rope import LinearScaling, Rope, yarn_attention_factor
from engine.layers.rope import YarnScaling
from memory.checkpoint.checkpoint import Checkpoint

BLOCK = "blk.{layer}."
GGUF_NAMES = {
    "embed": "token_embd.weight",
    "norm": "output_norm.weight",
    "head": "output.weight",
    "attn_norm": f"{BLOCK}attn_norm.weight",
    "q": f"{BLOCK}attn_q.weight",
    "k": f"{BLOCK}attn_k.weight",
    "v": f"{BLOCK}attn_v.weight",
    "o": f"{BLOCK}attn_output.weight",
    "q_norm": f"{BLOCK}attn_q_norm.weight",
    "k_norm": f"{BLOCK}attn_k_norm.weight",
    "sinks": f"{BLOCK}attn_sinks.weight",
    "q_a": f"{BLOCK}attn_q_a.weight",
    "q_a_norm": f"{BLOCK}attn_q_a_norm.weight",
    "q_b": f"{BLOCK}attn_q_b.weight",
    "kv_a": f"{BLOCK}attn_kv_a_mqa.weight",
    "kv_a_norm": f"{BLOCK}attn_kv_a_norm.weight",
    "kv_b": f"{BLOCK}attn_kv_b.weight",
    "k_b": f"{BLOCK}attn_k_b.weight",
    "v_b": f"{BLOCK}attn_v_b.weight",
    "index_q": f"{BLOCK}indexer.attn_q_b.weight",
    "index_k": f"{BLOCK}indexer.attn_k.weight",
    "index_k_norm": f"{BLOCK}indexer.k_norm.weight",
    "index_weights": f"{BLOCK}indexer.proj.weight",
    "ffn_norm": f"{BLOCK}ffn_norm.weight",
    "gate": f"{BLOCK}ffn_gate.weight",
    "up": f"{BLOCK}ffn_up.weight",
    "down": f"{BLOCK}ffn_down.weight",
    "router": f"{BLOCK}ffn_gate_inp.weight",
    "choice_bias": f"{BLOCK}exp_probs_b.bias",
    "expert_gate": f"{BLOCK}ffn_gate_exps.weight",
    "expert_up": f"{BLOCK}ffn_up_exps.weight",
    "expert_down": f"{BLOCK}ffn_down_exps.weight",
    "shared_gate": f"{BLOCK}ffn_gate_shexp.weight",
    "shared_up": f"{BLOCK}ffn_up_shexp.weight",
    "shared_down": f"{BLOCK}ffn_down_shexp.weight",
    "rope_factors": "rope_freqs.weight",
}
# Tokens that end an answer: of a sequence, of a turn, of a message.
SOFTMAX, SIGMOID = 1, 2  # numbers of expert_gating_func
ENDS = ("eos", "eot", "eom")
ROPE_KEYS = (
    "dimension_count", "freq_base", "scale_linear", "scaling.type", "scaling.factor", "scaling.attn_factor",
    "scaling.original_context_length",
    "scaling.finetuned",  # how the model was made; changes nothing
)  # fmt: skip
# Of these, llama.cpp computes a Llama with one value only.
ROPE_CONSTANTS = {
    "scaling.yarn_ext_factor": 1.0,
    "scaling.yarn_attn_factor": 1.0,
    "scaling.yarn_beta_fast": 32.0,
    "scaling.yarn_beta_slow": 1.0,
    "scaling.yarn_log_multiplier": 0.0,
}


def is_gguf(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint's config is GGUF metadata."""
    return "general.architecture" in checkpoint.config


def gguf_keys(checkpoint: Checkpoint, family: str) -> Keys:
    """Lookups in the metadata of the checkpoint's architecture, without its name before them."""
    prefix = f"{checkpoint.model_type}."
    own = {
        key.removeprefix(prefix): value for key, value in checkpoint.config.items() if key.startswith(prefix)
    }
    return Keys(checkpoint.path, family, own, prefix)


def layer_count(read: Keys) -> int:
    """`block_count`, if it is plausible."""
    layers = read.count("block_count")
    if layers > MOST_LAYERS:
        read.problems.append(f"the metadata says {layers} layers; no model has more than {MOST_LAYERS}")
        return 1
    return layers


def layers_before_drafts(read: Keys) -> tuple[int, str]:
    """Layers without the draft layers, which `block_count` includes; and a regular expression of the latter's
    tensors."""
    blocks, drafts = layer_count(read), read.count_or_none("nextn_predict_layers") or 0
    if drafts >= blocks:
        read.refuse("nextn_predict_layers", drafts, f"expected fewer than the {blocks} layers")
        drafts = 0
    return blocks - drafts, "|".join(rf"blk\.{n}\..*" for n in range(blocks - drafts, blocks))


def layers_behind_dense(
    read: Keys, attention: Attention | Mla, router: Router, dense: int
) -> tuple[list[Layer], str]:
    """`dense` layers with a plain feed-forward part, then those with experts and perhaps a network beside
    them; and the regular expression of `layers_before_drafts`."""
    width, shared = read.count("expert_feed_forward_length"), read.count_or_none("expert_shared_count")
    experts = Experts(router, width, "stacked", shared=Mlp(shared * width) if shared else None)
    mlp = Mlp(read.count("feed_forward_length"))
    count, drafts = layers_before_drafts(read)
    return [Layer(attention, mlp if n < dense else experts) for n in range(count)], drafts


def head_sizes(read: Keys) -> tuple[int, int, int]:
    """Query heads, key-value heads, channels of each."""
    heads = read.count("attention.head_count")
    kv_heads = read.count("attention.head_count_kv", heads)
    head_dim = read.count("attention.key_length", max(1, read.count("embedding_length") // heads))
    read.only("attention.value_length", head_dim, None)
    if heads % kv_heads:
        read.problems.append(f"{heads} query heads are not a multiple of {kv_heads} key-value heads")
    return heads, kv_heads, head_dim


def expert_counts(read: Keys) -> tuple[int, int]:
    """Routed experts of a layer, and how many of them a token uses."""
    return read.count("expert_count"), read.count("expert_used_count")


def rope_of(
    read: Keys,
    dims: int,
    pairs: Literal["half", "adjacent"],
    constants: Mapping[str, float] | None = None,
    *,
    is_rounded: bool = True,
) -> Rope:
    """Rotary embeddings as llama.cpp reads them: the factor under its new or its old key, linear where no
    type is named.

    constants: settings of YaRN that must have these values, where they are named. is_rounded: of YarnScaling.
    """
    kind = read.raw("rope.scaling.type")
    kind = "linear" if kind is None else kind
    if kind not in ("none", "linear", "yarn"):
        read.refuse("rope.scaling.type", kind, f"but the {read.family} family supports none, linear, yarn")
        kind = "none"
    for key, value in (ROPE_CONSTANTS if constants is None else constants).items():
        if f"rope.{key}" in read.config:
            read.only(f"rope.{key}", value)
    read.only("rope.dimension_count", dims, None)
    for key in ROPE_KEYS:
        read.raw(f"rope.{key}")
    if dims % 2:
        read.problems.append(f"head_dim is {dims}, expected an even number for rotary embedding")
    theta = read.number("rope.freq_base", 10000.0)
    attention_factor = read.number("rope.scaling.attn_factor", 1.0)
    keys = ("rope.scaling.factor", "rope.scale_linear")
    key = next((key for key in keys if key in read.config), keys[0])
    factor = 1.0 if read.config.get(key) == 0 else read.number(key, 1.0)
    if kind == "none" or factor == 1:
        return Rope(theta, dims, pairs, None, attention_factor)
    if kind == "linear":
        return Rope(theta, dims, pairs, LinearScaling(factor), attention_factor)
    original = read.count("rope.scaling.original_context_length", read.count("context_length"))
    scaling = YarnScaling(factor, original, 32.0, 1.0, is_rounded=is_rounded)
    return Rope(theta, dims, pairs, scaling, attention_factor * yarn_attention_factor(factor))


def expert_width(read: Keys) -> int:
    """Of an expert where all layers have them: it is written as the layers' width, or as the experts', or as
    both."""
    width = read.count("expert_feed_forward_length", read.count("feed_forward_length"))
    read.only("feed_forward_length", width, None)
    return width


def has_tensor(checkpoint: Checkpoint, role: str, ending: str = ".weight", layer: int = 0) -> bool:
    """Whether a layer has a tensor that only some files of an architecture have."""
    name = GGUF_NAMES[role].removesuffix(".weight") + ending
    return name.format(layer=layer) in checkpoint.entries


def describe_gguf(
    read: Keys,
    checkpoint: Checkpoint,
    layers: Sequence[Layer],
    names: Mapping[str, str] = GGUF_NAMES,
    *,
    ignored: str | None = None,
    embedding_factor: float = 1.0,
    residual_factor: float = 1.0,
    logits_factor: float = 1.0,
) -> Description:
    """The description with these layers, and the rest as the metadata says.

    ignored: a regular expression of tensors that are not used. Raises one ConfigError with everything that
    the lookups so far found wrong.
    """
    config: Mapping[str, Any] = checkpoint.config
    tokens = Keys(checkpoint.path, read.family, config)
    tokens.problems = read.problems
    description = Description(
        hidden=read.count("embedding_length"),
        vocab_size=read.count("vocab_size", len(config.get("tokenizer.ggml.tokens", ()))),
        max_context=read.count("context_length"),
        eps=read.number("attention.layer_norm_rms_epsilon"),
        layers=tuple(layers),
        names=names,
        ignored=re.compile(ignored) if ignored else None,
        embedding_factor=embedding_factor,
        residual_factor=residual_factor,
        logits_factor=logits_factor,
        is_tied=names["head"] not in checkpoint.entries,
        has_rope_factors=names["rope_factors"] in checkpoint.entries,
        bos_token_id=next(iter(tokens.token_ids("tokenizer.ggml.bos_token_id")), None),
        eos_token_ids=tokens.token_ids(*(f"tokenizer.ggml.{name}_token_id" for name in ENDS)),
    )
    read.problems += problems_of(layers)
    read.check_unknown()
    read.check()
    return description
