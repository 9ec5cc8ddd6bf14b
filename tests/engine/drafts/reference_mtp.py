"""Draft layers of V3's, GLM's and Qwen's families in float64, written from the specifications alone.

One sequence, no cache, nothing of the engine: tensors as the files have them, configs as dictionaries.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tests.engine.drafts.reference_stages import rms, rotate


def swapped_halves(x: torch.Tensor, positions: torch.Tensor, dims: int, theta: float) -> torch.Tensor:
    """The first `dims` channels of x `[rows, heads, channels]` turned; a pair is a channel and the one half a
    part later."""
    half = dims // 2
    angle = positions.double().view(-1, 1, 1) * theta ** (-torch.arange(half, dtype=torch.float64) / half)
    one, other = x[..., :half], x[..., half:dims]
    turned = (one * angle.cos() - other * angle.sin(), other * angle.cos() + one * angle.sin())
    return torch.cat((*turned, x[..., dims:]), dim=-1)


@dataclass(frozen=True)
class Names:
    layer: str
    combine: str
    of_embedding: str
    of_hidden: str
    norm: str


QWEN = Names(
    "mtp.layers.0", "mtp.fc", "mtp.pre_fc_norm_embedding", "mtp.pre_fc_norm_hidden", "mtp.norm"
)  # fmt: skip


def numbered(c: dict[str, Any]) -> Names:
    layer = f"model.layers.{c['num_hidden_layers']}"
    return Names(layer, *(f"{layer}.{part}" for part in ("eh_proj", "enorm", "hnorm", "shared_head.norm")))


class Reference:
    """A draft layer. c: config.json, of the text part."""

    def __init__(self, tensors: dict[str, torch.Tensor], c: dict[str, Any]) -> None:
        self.tensors, self.c = tensors, c
        self.is_qwen = "mtp.fc.weight" in tensors
        self.names = QWEN if self.is_qwen else numbered(c)
        self.eps = c["rms_norm_eps"]

    def logits(
        self, embed: torch.Tensor, head: torch.Tensor, hidden: torch.Tensor, behind: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of every token with its last hidden state `[tokens, hidden]` and the token behind it: logits, and
        the state behind the layer's norm."""
        names = self.names
        embedded = embed[list(behind)].double()
        both = (
            self.norm(names.of_embedding, embedded, self.eps),
            self.norm(names.of_hidden, hidden.double(), self.eps),
        )
        x = torch.cat(both, dim=1) @ self.matrix(names.combine).T
        normed = self.norm(f"{names.layer}.input_layernorm", x, self.eps)
        x = x + (self.latent(normed) if "kv_lora_rank" in self.c else self.grouped(normed))
        x = x + self.experts(self.norm(f"{names.layer}.post_attention_layernorm", x, self.eps))
        states = self.norm(names.norm, x, self.eps)
        return states @ head.double().T, states

    def matrix(self, name: str) -> torch.Tensor:
        """FP8 in tiles of 128 by 128, or floats."""
        weight = self.tensors[f"{name}.weight"]
        scale = self.tensors.get(f"{name}.weight_scale_inv")
        if scale is None:
            return weight.double()
        rows, cols = weight.shape
        spread = scale.double().repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :cols]
        return weight.double() * spread

    def norm(self, name: str, x: torch.Tensor, eps: float) -> torch.Tensor:
        weight = self.tensors[f"{name}.weight"].double()
        return rms(x, weight + 1 if self.is_qwen else weight, eps)

    # ------------------------------------------------------------------------------------- attention

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float,
        seen: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`[rows, heads, .]` each, causal; seen `[rows, rows]` says which of the earlier ones."""
        visible = torch.ones(len(q), len(q)).tril().bool()
        if seen is not None:
            visible &= seen
        scores = torch.einsum("rhd,khd->hrk", q, k) * scale
        return torch.einsum("hrk,khd->rhd", scores.masked_fill(~visible, -math.inf).softmax(2), v)

    def grouped(self, x: torch.Tensor) -> torch.Tensor:
        """Grouped-query attention with norms of heads, of which a part turns; perhaps gated."""
        c, attn = self.c, f"{self.names.layer}.self_attn"
        heads, kv_heads = c["num_attention_heads"], c["num_key_value_heads"]
        positions = torch.arange(len(x))

        def projected(name: str, count: int) -> torch.Tensor:
            out = x @ self.matrix(f"{attn}.{name}").T
            if (bias := self.tensors.get(f"{attn}.{name}.bias")) is not None:
                out = out + bias.double()
            return out.view(len(x), count, -1)

        q, k, v = projected("q_proj", heads), projected("k_proj", kv_heads), projected("v_proj", kv_heads)
        gate = None
        if self.is_qwen:
            q, gate = q.chunk(2, dim=2)
        dim = q.shape[2]
        if f"{attn}.q_norm.weight" in self.tensors:
            q, k = (
                self.norm(f"{attn}.{name}", part, self.eps) for name, part in (("q_norm", q), ("k_norm", k))
            )
        rope = c.get("rope_parameters") or {}
        part = rope.get("partial_rotary_factor", c.get("partial_rotary_factor", 1))
        theta = float(rope.get("rope_theta", c.get("rope_theta", 10000)))
        turned = [swapped_halves(one, positions, int(dim * part), theta) for one in (q, k)]
        each = heads // kv_heads
        k, v = (one.repeat_interleave(each, 1) for one in (turned[1], v))
        out = self.attend(turned[0], k, v, dim**-0.5)
        if gate is not None:
            out = out * torch.sigmoid(gate)
        return out.flatten(1) @ self.matrix(f"{attn}.o_proj").T

    def latent(self, x: torch.Tensor) -> torch.Tensor:
        """Multi-head latent attention, not absorbed; with an indexer where there is one."""
        c, attn = self.c, f"{self.names.layer}.self_attn"
        heads, plain, turns = c["num_attention_heads"], c["qk_nope_head_dim"], c["qk_rope_head_dim"]
        rank, positions = c["kv_lora_rank"], torch.arange(len(x))
        of_queries = self.norm(f"{attn}.q_a_layernorm", x @ self.matrix(f"{attn}.q_a_proj").T, 1e-6)
        q = (of_queries @ self.matrix(f"{attn}.q_b_proj").T).view(len(x), heads, plain + turns)
        kv = x @ self.matrix(f"{attn}.kv_a_proj_with_mqa").T
        latent = self.norm(f"{attn}.kv_a_layernorm", kv[:, :rank], 1e-6)
        both = (latent @ self.matrix(f"{attn}.kv_b_proj").T).view(len(x), heads, -1)
        shared = self.turned(kv[:, None, rank:], positions).expand(-1, heads, -1)
        k = torch.cat((both[..., :plain], shared), dim=2)
        q = torch.cat((q[..., :plain], self.turned(q[..., plain:], positions)), dim=2)
        scale = (plain + turns) ** -0.5 * self.mscale() ** 2
        out = self.attend(q, k, both[..., plain:], scale, self.chosen(x, of_queries, positions))
        return out.flatten(1) @ self.matrix(f"{attn}.o_proj").T

    def rope(self) -> dict[str, Any]:
        found: dict[str, Any] = self.c.get("rope_scaling") or self.c.get("rope_parameters") or {}
        return found

    def mscale(self) -> float:
        """Of the softmax' scale, where YaRN says so (its `mscale_all_dim`)."""
        rope = self.rope()
        if rope.get("type", rope.get("rope_type")) != "yarn" or not rope.get("mscale_all_dim"):
            return 1.0
        return 0.1 * float(rope["mscale_all_dim"]) * math.log(rope["factor"]) + 1.0

    def turned(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Neighbouring channels of x `[rows, heads, dims]`, by YaRN's frequencies where there is YaRN."""
        rope, dims = self.rope(), x.shape[2]
        theta = float(rope.get("rope_theta", self.c.get("rope_theta", 10000.0)))
        if rope.get("type", rope.get("rope_type")) != "yarn":
            return rotate(x, positions, dims, theta)
        pairs = torch.arange(dims // 2, dtype=torch.float64)
        speed = theta ** (-pairs * 2 / dims)
        original = rope["original_max_position_embeddings"]

        def edge(turns: float) -> float:
            return dims * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low = max(math.floor(edge(rope.get("beta_fast", 32))), 0)
        high = min(math.ceil(edge(rope.get("beta_slow", 1))), dims - 1)
        ramp = ((pairs - low) / max(high - low, 1e-3)).clamp(0, 1)
        speed = speed / rope["factor"] * ramp + speed * (1 - ramp)
        angle = positions.double().view(-1, 1, 1) * speed
        even, odd = x[..., 0::2], x[..., 1::2]
        both = (even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos())
        return torch.stack(both, dim=-1).flatten(2)

    def chosen(
        self, x: torch.Tensor, of_queries: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor | None:
        """The tokens that GLM-5's indexer chooses for each, `[rows, rows]`; its first channels turn, in
        neighbouring pairs."""
        name, c = f"{self.names.layer}.self_attn.indexer", self.c
        if f"{name}.wk.weight" not in self.tensors:
            return None
        heads, dim, turns = c["index_n_heads"], c["index_head_dim"], c["qk_rope_head_dim"]
        q = (of_queries @ self.matrix(f"{name}.wq_b").T).view(len(x), heads, dim)
        k = x @ self.matrix(f"{name}.wk").T
        k = torch.nn.functional.layer_norm(
            k,
            (dim,),
            self.tensors[f"{name}.k_norm.weight"].double(),
            self.tensors[f"{name}.k_norm.bias"].double(),
            1e-6,
        ).unsqueeze(1)
        q, k = (
            torch.cat((self.turned(one[..., :turns], positions), one[..., turns:]), dim=2) for one in (q, k)
        )
        weights = x @ self.matrix(f"{name}.weights_proj").T
        scores = torch.einsum("rh,rhk->rk", weights, torch.einsum("rhd,kd->rhk", q, k[:, 0]).relu())
        scores = scores.masked_fill(~torch.ones(len(x), len(x)).tril().bool(), -math.inf)
        best = scores.topk(min(c["index_topk"], len(x)), dim=1).indices
        return torch.zeros(len(x), len(x), dtype=torch.bool).scatter_(1, best, True)

    # --------------------------------------------------------------------------------------- experts

    def mlp(self, name: str, x: torch.Tensor) -> torch.Tensor:
        gate = torch.nn.functional.silu(x @ self.matrix(f"{name}.gate_proj").T)
        return (gate * (x @ self.matrix(f"{name}.up_proj").T)) @ self.matrix(f"{name}.down_proj").T

    def experts(self, x: torch.Tensor) -> torch.Tensor:
        c, name = self.c, f"{self.names.layer}.mlp"
        logits, top = x @ self.matrix(f"{name}.gate").T, c["num_experts_per_tok"]
        if self.is_qwen:
            scores = logits.softmax(1)
            ids = scores.topk(top).indices
            y = self.mlp(f"{name}.shared_expert", x)
            y = y * torch.sigmoid(x @ self.matrix(f"{name}.shared_expert_gate").T)
        else:
            scores = torch.sigmoid(logits)
            ids = self.best(scores + self.tensors[f"{name}.gate.e_score_correction_bias"].double(), top)
            y = self.mlp(f"{name}.shared_experts", x)
        shares = scores.gather(1, ids)
        if c.get("norm_topk_prob", True):
            shares = shares / (shares.sum(1, keepdim=True) + 1e-20)
        shares = shares * c.get("routed_scaling_factor", 1.0)
        for row in range(len(x)):
            for expert, share in zip(ids[row].tolist(), shares[row], strict=True):
                y[row] += share * self.mlp(f"{name}.experts.{expert}", x[row : row + 1])[0]
        return y

    def best(self, scores: torch.Tensor, top: int) -> torch.Tensor:
        """Groups are as good as their two best scores together; the best groups' best are chosen."""
        groups, kept = self.c.get("n_group", 1), self.c.get("topk_group", 1)
        if groups > 1:
            split = scores.view(len(scores), groups, -1)
            of_groups = split.topk(2, dim=2).values.sum(2).topk(kept, dim=1).indices
            allowed = torch.zeros(len(scores), groups, dtype=torch.bool).scatter_(1, of_groups, True)
            scores = split.masked_fill(~allowed.unsqueeze(2), -math.inf).flatten(1)
        return scores.topk(top).indices
