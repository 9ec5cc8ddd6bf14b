"""What the configs of V4 and V4.1 have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from engine.families.base import ModelInfo
from engine.layers.rope import YarnScaling
from quant.kernels.layers import RoutingRule


@dataclass(frozen=True)
class StreamConfig:
    """Fields are named as in the released config.json."""

    vocab_size: int
    hidden_size: int
    moe_intermediate_size: int
    num_attention_heads: int
    head_dim: int
    qk_rope_head_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    rms_norm_eps: float
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    routed_scaling_factor: float
    swiglu_limit: float
    sliding_window: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    rope_theta: float
    compress_rope_theta: float
    yarn: YarnScaling | None
    max_position_embeddings: int
    hc_mult: int
    hc_sinkhorn_iters: int
    hc_eps: float
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    @property
    def routing(self) -> RoutingRule:
        """How routers choose, and weigh what they or token ids have chosen."""
        return RoutingRule(
            self.num_experts_per_tok,
            "sqrt softplus",
            is_renormalised=True,
            epsilon=1e-20,
            factor=self.routed_scaling_factor,
        )

    def info(self, family: str, name: str) -> ModelInfo:
        """What other code needs to know of a model called `name`."""
        return ModelInfo(
            family=family,
            name=name,
            vocab_size=self.vocab_size,
            max_context=self.max_position_embeddings,
            bos_token_id=self.bos_token_id,
            eos_token_ids=self.eos_token_ids,
        )

    def implausible(self, most: Mapping[str, int], narrowest: int) -> list[str]:
        """What is wrong with sizes: fields that say more than `most`, by name; and a part of heads that is
        rotated, if it does not fit the `narrowest`."""
        found = [
            f"{name} is {getattr(self, name)}; no model has more than {limit}"
            for name, limit in most.items()
            if getattr(self, name) > limit
        ]
        if self.qk_rope_head_dim % 2 or self.qk_rope_head_dim > narrowest:
            found.append(
                f"qk_rope_head_dim is {self.qk_rope_head_dim}, expected an even number up to {narrowest}"
            )
        return found
