"""The configuration of a DeepSeek-V4 model, read from the released config.json."""

from __future__ import annotations

from dataclasses import dataclass, replace

from engine.cache.grouped import Groups
from engine.families.decoder.hf import MOST_LAYERS
from engine.families.decoder.keys import HARMLESS, Keys
from engine.families.streams.config import StreamConfig
from engine.families.streams.dspark import DSparkShape
from engine.layers.rope import YarnScaling
from memory.checkpoint.checkpoint import Checkpoint

INDEXED = 4  # the ratio whose groups overlap, and whose entries an indexer chooses among
ALL_SEEN = 128  # the ratio whose entries are all attended to
# Of draft stages, which lie behind the model's layers.
DRAFT_KEYS = (
    "num_nextn_predict_layers", "dspark_block_size", "dspark_noise_token_id", "dspark_target_layer_ids",
    "dspark_markov_rank", "dspark_n_routed_experts", "dspark_num_experts_per_tok",
    "dspark_n_activated_experts",
)  # fmt: skip
# What is counted or computed one by one; a config that says more is damaged.
MOST = {"vocab_size": 100_000_000, "n_routed_experts": 100_000, "hc_mult": 1_000, "hc_sinkhorn_iters": 10_000}


@dataclass(frozen=True)
class V4Config(StreamConfig):
    """And what V4 alone has.

    ratios         of each layer, tokens per compressed entry; 0 where it sees its window alone
    hashed_layers  how many of the first layers choose experts by the token's id
    dspark         of draft stages, where the checkpoint has these
    """

    ratios: tuple[int, ...]
    hashed_layers: int
    dspark: DSparkShape | None = None

    @property
    def layers(self) -> int:
        """How many there are."""
        return len(self.ratios)

    def groups(self, layer: int) -> tuple[Groups, ...]:
        """The kinds of entries that a layer makes: what it attends to, and keys by which it chooses."""
        ratio = self.ratios[layer]
        if ratio == INDEXED:
            return Groups(ratio, self.head_dim, True), Groups(ratio, self.index_head_dim, True)
        return (Groups(ratio, self.head_dim, False),) if ratio else ()


def parse_config(checkpoint: Checkpoint) -> V4Config:
    """The config of a checkpoint.

    Raises one ConfigError that names every key that is missing, wrong, or asks for what is not computed.
    """
    read = Keys(checkpoint.path, "deepseek_v4", checkpoint.config)
    read.only("hidden_act", "silu")
    read.only("scoring_func", "sqrtsoftplus")
    read.only("topk_method", "noaux_tc", None)
    read.only("norm_topk_prob", True)
    read.only("tie_word_embeddings", False, None)
    read.only("attention_bias", False, None)
    read.only("num_key_value_heads", 1)
    read.only("expert_dtype", "fp4", "fp8", None)
    for key in DRAFT_KEYS:
        read.raw(key)
    ratios = _ratios(read)
    config = V4Config(
        vocab_size=read.count("vocab_size"),
        hidden_size=read.count("hidden_size"),
        moe_intermediate_size=read.count("moe_intermediate_size"),
        num_attention_heads=read.count("num_attention_heads"),
        head_dim=read.count("head_dim"),
        qk_rope_head_dim=read.count("qk_rope_head_dim"),
        q_lora_rank=read.count("q_lora_rank"),
        o_groups=read.count("o_groups"),
        o_lora_rank=read.count("o_lora_rank"),
        rms_norm_eps=read.number("rms_norm_eps"),
        n_routed_experts=read.count("n_routed_experts"),
        n_shared_experts=read.count("n_shared_experts"),
        num_experts_per_tok=read.count("num_experts_per_tok"),
        routed_scaling_factor=read.number("routed_scaling_factor"),
        swiglu_limit=read.number("swiglu_limit"),
        sliding_window=read.count("sliding_window"),
        ratios=ratios,
        hashed_layers=read.count_or_none("num_hash_layers") or 0,
        index_n_heads=read.count("index_n_heads"),
        index_head_dim=read.count("index_head_dim"),
        index_topk=read.count("index_topk"),
        rope_theta=read.number("rope_theta"),
        compress_rope_theta=read.number("compress_rope_theta"),
        yarn=_yarn(read),
        max_position_embeddings=read.count("max_position_embeddings"),
        hc_mult=read.count("hc_mult"),
        hc_sinkhorn_iters=read.count("hc_sinkhorn_iters"),
        hc_eps=read.number("hc_eps"),
        bos_token_id=next(iter(read.token_ids("bos_token_id")), None),
        eos_token_ids=read.token_ids("eos_token_id"),
    )
    read.problems += _contradictions(config)
    read.check_unknown(HARMLESS)
    read.check()
    if "mtp.0.main_proj.weight" not in checkpoint.entries:
        return config
    return replace(config, dspark=DSparkShape.of(checkpoint.config, config.layers, config.vocab_size))


def _ratios(read: Keys) -> tuple[int, ...]:
    """`compress_ratios` of the model's layers; draft stages have theirs behind them."""
    layers, given = read.count("num_hidden_layers"), read.raw("compress_ratios")
    if layers > MOST_LAYERS:
        read.problems.append(f"the config says {layers} layers; no model has more than {MOST_LAYERS}")
        return (0,)
    if not isinstance(given, list) or len(given) < layers:
        read.refuse("compress_ratios", given, f"expected a list with a number for each of {layers} layers")
        return (0,)
    known = (0, INDEXED, ALL_SEEN)
    ratios = given[:layers]
    if any(type(ratio) is not int or ratio not in known for ratio in ratios):
        read.refuse_choice("compress_ratios", ratios, known)
        return (0,)
    return tuple(ratios)


def _yarn(read: Keys) -> YarnScaling | None:
    """How positions are stretched where layers see compressed entries; it changes frequencies alone."""
    given = read.raw("rope_scaling")
    if given is None:
        return None
    if not isinstance(given, dict):
        read.refuse("rope_scaling", given, "expected an object")
        return None
    inner = read.inner("rope_scaling", given)
    inner.only("type" if "type" in given else "rope_type", "yarn")
    for key in ("mscale", "mscale_all_dim", "attention_factor"):
        inner.only(key, 1, None)
    scaling = YarnScaling(
        inner.number("factor"),
        inner.count("original_max_position_embeddings"),
        inner.number("beta_fast", 32),
        inner.number("beta_slow", 1),
    )
    inner.check_unknown()
    return scaling


def _contradictions(c: V4Config) -> list[str]:
    """What fields say against each other."""
    found = c.implausible(MOST, min(c.head_dim, c.index_head_dim))
    if c.num_attention_heads % c.o_groups:
        found.append(f"o_groups {c.o_groups} does not divide {c.num_attention_heads} heads")
    if c.num_experts_per_tok > c.n_routed_experts:
        found.append(f"top {c.num_experts_per_tok} of {c.n_routed_experts} experts")
    if c.hashed_layers > c.layers:
        found.append(f"num_hash_layers is {c.hashed_layers} of {c.layers} layers")
    return found
