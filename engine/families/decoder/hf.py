"""What families read alike from a config.json: sizes, rotary embeddings, tokens, tied heads."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence, Set
from typing import Any, Literal

from engine.families.decoder.description import Attention, Description, Experts, Layer, Mla, Mlp, Router
from engine.families.decoder.keys import HARMLESS, Keys
from engine.families.decoder.plausible import problems_of
from engine.families.decoder.rope import LinearScaling, Llama3Scaling, Rope, yarn_attention_factor
from engine.layers.rope import YarnScaling
from memory.checkpoint.checkpoint import Checkpoint
from quant.errors import ConfigError
from quant.formats.quantization_config import QuantizationConfig

MOST_LAYERS = 10_000  # every layer's tensors are counted: a config that says more is damaged
# Buffers that old checkpoints store besides the weights, and that every reader recomputes: frequencies
# of rotary embeddings, causal masks.
BUFFERS = r"(.*\.)?rotary_emb\..*|.*attn\.(masked_)?bias"

# rope type -> the keys that it has besides those that all have
ROPE_KEYS = {
    "default": set[str](),
    "linear": {"factor"},
    "dynamic": {"factor"},
    "llama3": {"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"},
    "yarn": {
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    },
}
ROPE_COMMON = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned"}


def layer_count(read: Keys) -> int:
    """`num_hidden_layers`, if it is plausible."""
    layers = read.count("num_hidden_layers")
    if layers > MOST_LAYERS:
        read.problems.append(f"the config says {layers} layers; no model has more than {MOST_LAYERS}")
        return 1
    return layers


def layers_behind_dense(
    read: Keys, attention: Attention | Mla, router: Router, shared: int | None
) -> list[Layer]:
    """`first_k_dense_replace` layers with a plain feed-forward part, then those with experts.

    shared  experts' widths that the network beside them has; 0 or None for none
    """
    width = read.count("moe_intermediate_size")
    experts = Experts(router, width, "each", shared=Mlp(shared * width) if shared else None)
    mlp, dense = Mlp(read.count("intermediate_size")), read.count_or_none("first_k_dense_replace") or 0
    return [Layer(attention, mlp if n < dense else experts) for n in range(layer_count(read))]


def head_sizes(read: Keys) -> tuple[int, int, int]:
    """Query heads, key-value heads, channels of each."""
    hidden, heads = read.count("hidden_size"), read.count("num_attention_heads")
    kv_heads = read.count("num_key_value_heads", heads)
    head_dim = read.count("head_dim", max(1, hidden // heads))
    if heads % kv_heads:
        read.problems.append(f"{heads} query heads are not a multiple of {kv_heads} key-value heads")
    return heads, kv_heads, head_dim


def rope_of(
    read: Keys,
    dims: int,
    *,
    pairs: Literal["half", "adjacent"] = "half",
    part: float | None = None,
    theta: float = 10000.0,
    unused: Set[str] = frozenset(),
) -> Rope:
    """Rotary embeddings of heads of `dims` channels, as `transformers` reads them.

    Of `rope_scaling`, or of `rope_parameters` as newer configs call it. part: of the channels that turn where
    `partial_rotary_factor` does not say so; None for a family of which all turn. theta: what
    `transformers` takes for the family where `rope_theta` is not there. unused: further keys that change
    nothing.
    """
    given = _rope_object(read)
    inner = read.inner("rope_scaling", given)
    kind = given.get("rope_type", given.get("type", "default"))
    if not isinstance(kind, str) or kind not in ROPE_KEYS:
        read.problems.append(
            f"rope scaling {kind!r} is not supported by the {read.family} family; it supports "
            f"{', '.join(ROPE_KEYS)}"
        )
        kind = "default"
    elif unknown := sorted(given.keys() - ROPE_KEYS[kind] - ROPE_COMMON - unused):
        read.problems.append(
            f"rope_scaling has {', '.join(unknown)}, which rope scaling {kind!r} does not use"
        )
    if part is None:
        for keys in (inner, read):
            keys.only("partial_rotary_factor", 1, None)
    else:
        dims = int(dims * inner.number("partial_rotary_factor", read.number("partial_rotary_factor", part)))
    if dims % 2 or dims < 1:
        read.problems.append(f"head_dim is {dims}, expected an even number for rotary embedding")
    theta = inner.number("rope_theta", read.number("rope_theta", theta))
    original = read.raw("original_max_position_embeddings")
    if kind in ("default", "dynamic"):  # dynamic stretches only what is beyond the most that is served
        return Rope(theta, dims, pairs)
    context = read.count("max_position_embeddings")
    if original is None:
        original = inner.count("original_max_position_embeddings", context)
    else:
        original = read.count("original_max_position_embeddings")
    factor = inner.number("factor", context / original if kind == "yarn" else None)
    if kind == "linear":
        return Rope(theta, dims, pairs, LinearScaling(factor))
    if kind == "llama3":
        low, high = inner.number("low_freq_factor"), inner.number("high_freq_factor")
        if low >= high:
            read.problems.append(f"rope_scaling.low_freq_factor {low} is not below high_freq_factor")
            high = low + 1
        return Rope(theta, dims, pairs, Llama3Scaling(factor, original, low, high))
    return _yarn(inner, Rope(theta, dims, pairs), factor, original)


def _rope_object(read: Keys) -> Mapping[str, Any]:
    found = [rope for key in ("rope_scaling", "rope_parameters") if (rope := read.raw(key))]
    if len(found) == 2 and found[0] != found[1]:
        read.problems.append("rope_scaling and rope_parameters disagree; keep one")
    given = found[0] if found else {}
    if not isinstance(given, dict):
        read.refuse("rope_scaling", given, "expected an object")
        return {}
    return {key: value for key, value in given.items() if value is not None}


def _yarn(read: Keys, plain: Rope, factor: float, original: int) -> Rope:
    attention_factor = yarn_attention_factor(factor)
    mscale, of_all = read.raw("mscale"), read.raw("mscale_all_dim")
    if mscale and of_all:
        attention_factor = yarn_attention_factor(factor, read.number("mscale"))
        attention_factor /= yarn_attention_factor(factor, read.number("mscale_all_dim"))
    scaling = YarnScaling(
        factor,
        original,
        read.number("beta_fast", 32.0),
        read.number("beta_slow", 1.0),
        is_rounded=read.flag("truncate", default=True),
    )
    return Rope(
        plain.theta, plain.dims, plain.pairs, scaling, read.number("attention_factor", attention_factor)
    )


def describe(
    read: Keys,
    checkpoint: Checkpoint,
    layers: Sequence[Layer],
    names: Mapping[str, str],
    *,
    ignored: str = "",
    embedding_factor: float = 1.0,
    residual_factor: float = 1.0,
    logits_factor: float = 1.0,
    norm_offset: float = 0.0,
) -> Description:
    """The description with these layers, and the rest as config.json says.

    names: role -> tensor name; ignored: a regular expression of further tensors that are not used. Raises one
    ConfigError with everything that the lookups so far found wrong.
    """
    is_tied = read.flag("tie_word_embeddings")
    if is_tied and names["head"] in checkpoint.entries:
        # Of the two names of one tensor a file may keep either. Where it has both, they may differ.
        is_tied = names["embed"] not in checkpoint.entries
        names = {**names, "embed": names["head"]} if is_tied else names
    description = Description(
        hidden=read.count("hidden_size"),
        vocab_size=read.count("vocab_size"),
        max_context=read.count("max_position_embeddings"),
        eps=read.number("rms_norm_eps"),
        layers=tuple(layers),
        names=names,
        ignored=re.compile("|".join(filter(None, (BUFFERS, ignored)))),
        embedding_factor=embedding_factor,
        residual_factor=residual_factor,
        logits_factor=logits_factor,
        norm_offset=norm_offset,
        is_tied=is_tied,
        bos_token_id=next(iter(read.token_ids("bos_token_id")), None),
        eos_token_ids=read.token_ids("eos_token_id"),
    )
    try:
        QuantizationConfig.parse(checkpoint.config)
    except ConfigError as error:
        read.problems.append(str(error))
    read.problems += problems_of(layers)
    read.check_unknown(HARMLESS)
    read.check()
    return description


def keys_of(checkpoint: Checkpoint, family: str) -> Keys:
    """Lookups in a checkpoint's config.json."""
    return Keys(checkpoint.path, family, checkpoint.config)


def plain_attention(read: Keys, theta: float = 10000.0) -> Attention:
    """Grouped-query attention with nothing beside it, its rotary embeddings over whole heads.

    theta: of `rope_of`.
    """
    heads, kv_heads, head_dim = head_sizes(read)
    return Attention(heads, kv_heads, head_dim, rope_of(read, head_dim, theta=theta))
