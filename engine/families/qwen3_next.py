"""Qwen3-Next: three layers of gated DeltaNet, then one of attention with gates; experts with a shared one.

Keys of config.json: https://huggingface.co/Qwen/Qwen3-Next-80B-A3B-Instruct and `transformers`'
Qwen3NextConfig. `qwen3_5_moe.py` shares what is here.
"""

from __future__ import annotations

from dataclasses import replace

from engine.families.decoder.description import Attention, DeltaNet, Description, Experts, Layer, Mlp, Router
from engine.families.decoder.family import DecoderFamily
from engine.families.decoder.hf import describe, head_sizes, keys_of, layer_count, rope_of
from engine.families.decoder.keys import Keys
from engine.families.decoder.names import HF_NAMES, LAYER
from memory.checkpoint.checkpoint import Checkpoint

NAME = "qwen3_next"
DELTA = f"{LAYER}linear_attn."
NAMES = {
    **HF_NAMES,
    "conv": f"{DELTA}conv1d.weight",
    "decay_rate": f"{DELTA}A_log",
    "decay_bias": f"{DELTA}dt_bias",
    "in_qkvz": f"{DELTA}in_proj_qkvz.weight",
    "in_ba": f"{DELTA}in_proj_ba.weight",
    "in_qkv": f"{DELTA}in_proj_qkv.weight",
    "in_z": f"{DELTA}in_proj_z.weight",
    "in_b": f"{DELTA}in_proj_b.weight",
    "in_a": f"{DELTA}in_proj_a.weight",
    "delta_norm": f"{DELTA}norm.weight",
    "delta_out": f"{DELTA}out_proj.weight",
    "shared_gate": f"{LAYER}mlp.shared_expert.gate_proj.weight",
    "shared_up": f"{LAYER}mlp.shared_expert.up_proj.weight",
    "shared_down": f"{LAYER}mlp.shared_expert.down_proj.weight",
    "shared_share": f"{LAYER}mlp.shared_expert_gate.weight",
}
DRAFT = r"mtp\..*"
LINEAR, FULL = "linear_attention", "full_attention"
# What native kernels compute with: vectors of so many channels, and at most so many of keys.
WHOLE, MOST_KEY_DIM = 16, 256
# The sections of mRoPE, which turn alike where all tokens are text.
MROPE = frozenset({"mrope_section", "mrope_interleaved"})


def describe_qwen3_next(checkpoint: Checkpoint) -> Description:
    """The description of a checkpoint. Raises ConfigError naming everything that is not computed."""
    read = keys_of(checkpoint, NAME)
    read.only("use_sliding_window", False, None)
    mixers = layers_of(read, replace(delta_net_of(read), is_grouped=True))
    experts = experts_of(read)
    experts = replace(
        experts, router=replace(experts.router, is_renormalised=read.flag("norm_topk_prob", default=True))
    )
    step, dense = read.count("decoder_sparse_step", 1), read.raw("mlp_only_layers") or []
    mlp = Mlp(read.count("intermediate_size"))
    layers = [
        Layer(mixer, mlp if n in dense or (n + 1) % step else experts) for n, mixer in enumerate(mixers)
    ]
    return describe(read, checkpoint, layers, NAMES, ignored=DRAFT, norm_offset=1.0)


def layers_of(read: Keys, delta_net: DeltaNet) -> list[Attention | DeltaNet]:
    """What each layer has: as `layer_types` says, or attention in every so many."""
    count, interval = layer_count(read), read.count("full_attention_interval", 4)
    types = read.raw("layer_types")
    if types is None:
        types = [LINEAR if (n + 1) % interval else FULL for n in range(count)]
    elif not isinstance(types, list) or len(types) != count or not {*types} <= {LINEAR, FULL}:
        read.refuse("layer_types", types, f"expected {count} of {LINEAR}, {FULL}")
        types = [FULL] * count
    attention = gated_attention(read)
    if FULL not in types:
        read.problems.append("no layer has full attention")
    return [attention if kind == FULL else delta_net for kind in types]


def gated_attention(read: Keys) -> Attention:
    """Attention with norms of heads and gates of outputs, a part of each head turned."""
    read.only("hidden_act", "silu", None)
    read.only("attention_bias", False, None)
    heads, kv_heads, head_dim = head_sizes(read)
    rope = rope_of(read, head_dim, part=0.25, unused=MROPE)
    return Attention(heads, kv_heads, head_dim, rope, qk_norm="head", has_gate=True)


def delta_net_of(read: Keys) -> DeltaNet:
    """Gated DeltaNet, its projections apart."""
    found = DeltaNet(
        key_heads=read.count("linear_num_key_heads"),
        value_heads=read.count("linear_num_value_heads"),
        key_dim=read.count("linear_key_head_dim"),
        value_dim=read.count("linear_value_head_dim"),
        taps=read.count("linear_conv_kernel_dim"),
    )
    if found.value_heads % found.key_heads:
        read.problems.append(
            f"{found.value_heads} value heads are not a multiple of {found.key_heads} key heads"
        )
    if found.key_dim % WHOLE or found.key_dim > MOST_KEY_DIM:
        read.refuse(
            "linear_key_head_dim", found.key_dim, f"expected a multiple of {WHOLE} up to {MOST_KEY_DIM}"
        )
    if found.value_dim % WHOLE:
        read.refuse("linear_value_head_dim", found.value_dim, f"expected a multiple of {WHOLE}")
    if found.taps < 2:
        read.refuse("linear_conv_kernel_dim", found.taps, "expected at least 2")
    return found


def experts_of(read: Keys) -> Experts:
    """Softmax routing, renormalised, and a shared expert with a gate."""
    router = Router(
        experts=read.count("num_experts"),
        top_k=read.count("num_experts_per_tok"),
        score="softmax",
        is_renormalised=True,
    )
    return Experts(
        router,
        read.count("moe_intermediate_size"),
        "each",
        shared=Mlp(read.count("shared_expert_intermediate_size")),
        has_shared_gate=True,
    )


FAMILY = DecoderFamily(NAME, describe_qwen3_next)
