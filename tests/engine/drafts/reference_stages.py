"""DSpark stages in float64, written from the specification alone: one sequence, one block, no cache.

Nothing of the engine is used. Every function takes tensors as the files have them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)


def decoded(tensors: dict[str, torch.Tensor], name: str, tile: int) -> torch.Tensor:
    """A matrix's numbers: FP8 in tiles, FP4 in groups of 32, or floats."""
    weight = tensors[f"{name}.weight"]
    scale = tensors.get(f"{name}.scale")
    if scale is None:
        return weight.double()
    scales = torch.exp2(scale.view(torch.uint8).double() - 127)
    if weight.dtype == torch.int8:
        codes = weight.view(torch.uint8).long()
        both = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(1)  # the low nibble is the even column
        values = E2M1[both & 7] * (1 - 2 * (both >> 3))
        return values * scales.repeat_interleave(32, 1)
    rows, cols = weight.shape
    spread = scales.repeat_interleave(tile, 0)[:rows].repeat_interleave(tile, 1)[:, :cols]
    return weight.double() * spread


def rms(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    out = x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps)
    return out if weight is None else out * weight.double()


def rotate(x: torch.Tensor, positions: torch.Tensor, dims: int, theta: float, sign: int = 1) -> torch.Tensor:
    """The last `dims` channels of x `[rows, ..., channels]`, in neighbouring pairs."""
    pairs = dims // 2
    speed = theta ** (-torch.arange(pairs, dtype=torch.float64) * 2 / dims)
    angle = sign * positions.double().unsqueeze(1) * speed
    angle = angle.view(len(positions), *[1] * (x.dim() - 2), pairs)
    out = x.clone()
    even, odd = x[..., -dims::2], x[..., -dims + 1 :: 2]
    out[..., -dims::2] = even * angle.cos() - odd * angle.sin()
    out[..., -dims + 1 :: 2] = even * angle.sin() + odd * angle.cos()
    return out


@dataclass(frozen=True)
class Connection:
    pre: torch.Tensor
    post: torch.Tensor
    combine: torch.Tensor


def connection(
    tensors: dict[str, torch.Tensor], prefix: str, streams: torch.Tensor, c: dict[str, Any]
) -> Connection:
    """Section 3 of both specifications: streams `[rows, hc, hidden]`."""
    hc, eps = c["hc_mult"], c["hc_eps"]
    fn, base, scale = (tensors[f"{prefix}_{part}"].double() for part in ("fn", "base", "scale"))
    flat = streams.flatten(1)
    m = flat @ fn.T / torch.sqrt(flat.square().mean(1, keepdim=True) + c["rms_norm_eps"])
    pre = torch.sigmoid(m[:, :hc] * scale[0] + base[:hc]) + eps
    post = 2 * torch.sigmoid(m[:, hc : 2 * hc] * scale[1] + base[hc : 2 * hc])
    mix = (m[:, 2 * hc :] * scale[2] + base[2 * hc :]).view(-1, hc, hc).softmax(2) + eps
    mix = mix / (mix.sum(1, keepdim=True) + eps)
    for _ in range(c["hc_sinkhorn_iters"] - 1):
        mix = mix / (mix.sum(2, keepdim=True) + eps)
        mix = mix / (mix.sum(1, keepdim=True) + eps)
    return Connection(pre, post, mix)


def read(streams: torch.Tensor, pre: torch.Tensor) -> torch.Tensor:
    return torch.einsum("rh,rhd->rd", pre, streams)


def written(streams: torch.Tensor, y: torch.Tensor, con: Connection) -> torch.Tensor:
    return con.post.unsqueeze(2) * y.unsqueeze(1) + torch.einsum("rij,rid->rjd", con.combine, streams)


class Stage:
    """One stage's sublayers.

    norms_queries  each head of the queries is divided by its root mean square (V4)
    """

    def __init__(
        self,
        tensors: dict[str, torch.Tensor],
        prefix: str,
        c: dict[str, Any],
        *,
        tile: int,
        top_k: int,
        norms_queries: bool,
    ) -> None:
        self.tensors, self.prefix, self.c, self.tile = tensors, prefix, c, tile
        self.top_k, self.norms_queries = top_k, norms_queries

    def matrix(self, name: str) -> torch.Tensor:
        return decoded(self.tensors, f"{self.prefix}.{name}", self.tile)

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return rms(x, self.tensors[f"{self.prefix}.{name}.weight"], self.c["rms_norm_eps"])

    def keyed(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Key and value in one, `[rows, dim]`."""
        kv = self.norm("attn.kv_norm", x @ self.matrix("attn.wkv").T)
        return rotate(kv, positions, self.c["qk_rope_head_dim"], self.c["rope_theta"])

    def attention(
        self, x: torch.Tensor, positions: torch.Tensor, before: torch.Tensor, visible: torch.Tensor
    ) -> torch.Tensor:
        """Rows x see `before` `[n, dim]` and their own keys, as far as `visible` `[rows, n + rows]` says."""
        c, heads, dim = self.c, self.c["num_attention_heads"], self.c["head_dim"]
        turn = (c["qk_rope_head_dim"], c["rope_theta"])
        qr = self.norm("attn.q_norm", x @ self.matrix("attn.wq_a").T)
        q = (qr @ self.matrix("attn.wq_b").T).view(len(x), heads, dim)
        if self.norms_queries:
            q = rms(q, None, c["rms_norm_eps"])
        q = rotate(q, positions, *turn)
        keys = torch.cat((before, self.keyed(x, positions)))
        scores = torch.einsum("rhd,kd->rhk", q, keys) * dim**-0.5
        scores = scores.masked_fill(~visible.unsqueeze(1), -math.inf)
        sink = self.tensors[f"{self.prefix}.attn.attn_sink"].double().view(1, heads, 1)
        weights = torch.cat((scores, sink.expand(len(x), -1, 1)), dim=2).softmax(2)[:, :, :-1]
        out = rotate(torch.einsum("rhk,kd->rhd", weights, keys), positions, *turn, sign=-1)
        groups = out.flatten(1).view(len(x), c["o_groups"], -1)
        wo_a = self.matrix("attn.wo_a").view(c["o_groups"], c["o_lora_rank"], -1)
        low = torch.einsum("rgi,goi->rgo", groups, wo_a).flatten(1)
        return low @ self.matrix("attn.wo_b").T

    def expert(self, name: str, x: torch.Tensor) -> torch.Tensor:
        limit = self.c["swiglu_limit"]
        gate = (x @ self.matrix(f"{name}.w1").T).clamp(max=limit)
        up = (x @ self.matrix(f"{name}.w3").T).clamp(-limit, limit)
        return (gate * torch.sigmoid(gate) * up) @ self.matrix(f"{name}.w2").T

    def experts(self, x: torch.Tensor) -> torch.Tensor:
        """Section 5."""
        logits = x @ self.matrix("ffn.gate").T
        scores = torch.sqrt(torch.nn.functional.softplus(logits))
        bias = self.tensors[f"{self.prefix}.ffn.gate.bias"].double()
        y = self.expert("ffn.shared_experts", x)
        for row, ids in enumerate((scores + bias).topk(self.top_k).indices.tolist()):
            shares = scores[row, ids] / (scores[row, ids].sum() + 1e-20) * self.c["routed_scaling_factor"]
            for expert, share in zip(ids, shares, strict=True):
                y[row] += share * self.expert(f"ffn.experts.{expert}", x[row : row + 1])[0]
        return y


@dataclass(frozen=True)
class Block:
    """What is drafted: tokens, the logits of each `[block, vocab]`, and the confidence in it."""

    token_ids: list[int]
    logits: torch.Tensor
    confidence: torch.Tensor


@dataclass(frozen=True)
class Begun:
    """What a block's first stage begins with.

    last     the prefix of the last stage
    main     what is keyed of the tokens before the block, `[n, hidden]`, at positions `before`
    streams  `[block, hc, hidden]`, at `positions`
    """

    stages: int
    last: str
    main: torch.Tensor
    before: torch.Tensor
    positions: torch.Tensor
    streams: torch.Tensor

    @classmethod
    def of(
        cls,
        tensors: dict[str, torch.Tensor],
        c: dict[str, Any],
        embed: torch.Tensor,
        captures: torch.Tensor,
        start: int,
        newest: int,
        *,
        tile: int,
    ) -> Begun:
        """Behind captures `[tokens, targets * hidden]` of the tokens from position `start` on."""
        block, stages = c["dspark_block_size"], 1 + max(int(name.split(".")[1]) for name in tensors)
        main = captures.double() @ decoded(tensors, "mtp.0.main_proj", tile).T
        main = rms(main, tensors["mtp.0.main_norm.weight"], c["rms_norm_eps"])[-c["sliding_window"] :]
        end = start + len(captures)
        ids = [newest] + [c["dspark_noise_token_id"]] * (block - 1)
        return cls(
            stages,
            f"mtp.{stages - 1}",
            main,
            torch.arange(end - len(main), end),
            torch.arange(end, end + block),
            embed[ids].double().unsqueeze(1).repeat(1, c["hc_mult"], 1),
        )

    def attended(self, stage: Stage, x: torch.Tensor) -> torch.Tensor:
        """Rows of the block see each other and all that is keyed."""
        visible = torch.ones(len(x), len(self.main) + len(x), dtype=torch.bool)
        return stage.attention(x, self.positions, stage.keyed(self.main, self.before), visible)


def ended(
    tensors: dict[str, torch.Tensor],
    c: dict[str, Any],
    last: str,
    head: torch.Tensor,
    states: torch.Tensor,
    newest: int,
    *markov: str,
) -> Block:
    """The block, by what its last stage leaves."""
    base = rms(states, tensors[f"{last}.norm.weight"], c["rms_norm_eps"]) @ head.double().T
    parts = (tensors[f"{last}.{name}.weight"] for name in (*markov, "confidence_head.proj"))
    return chained(states, base, newest, *parts)


def v41_block(
    tensors: dict[str, torch.Tensor],
    c: dict[str, Any],
    embed: torch.Tensor,
    head: torch.Tensor,
    captures: torch.Tensor,
    start: int,
    newest: int,
) -> Block:
    """Section 9 of V4.1: captures `[tokens, targets * hidden]` of the tokens from position `start` on, up to
    the one before the newest."""
    begun = Begun.of(tensors, c, embed, captures, start, newest, tile=32)
    streams = begun.streams
    pre = torch.zeros(streams.shape[:2], dtype=torch.float64)
    pre[:, 0] = 1
    for n in range(begun.stages):
        stage = Stage(
            tensors, f"mtp.{n}", c, tile=32, top_k=c["dspark_num_experts_per_tok"], norms_queries=False
        )
        con = connection(tensors, f"mtp.{n}.hc_attn", streams, c)
        x = stage.norm("attn_norm", read(streams, pre))
        y = begun.attended(stage, x)
        streams, pre = written(streams, y, con), con.pre
        con = connection(tensors, f"mtp.{n}.hc_ffn", streams, c)
        y = stage.experts(stage.norm("ffn_norm", read(streams, pre)))
        streams, pre = written(streams, y, con), con.pre
    states = read(streams, pre)
    return ended(tensors, c, begun.last, head, states, newest, "markov_head.embed", "markov_head.head")


def v4_block(
    tensors: dict[str, torch.Tensor],
    c: dict[str, Any],
    embed: torch.Tensor,
    head: torch.Tensor,
    captures: torch.Tensor,
    start: int,
    newest: int,
) -> Block:
    """Section 7 of V4: the same arguments, captured behind its target layers."""
    begun = Begun.of(tensors, c, embed, captures, start, newest, tile=128)
    streams = begun.streams
    for n in range(begun.stages):
        stage = Stage(tensors, f"mtp.{n}", c, tile=128, top_k=c["num_experts_per_tok"], norms_queries=True)
        con = connection(tensors, f"mtp.{n}.hc_attn", streams, c)
        x = stage.norm("attn_norm", read(streams, con.pre))
        y = begun.attended(stage, x)
        streams = written(streams, y, con)
        con = connection(tensors, f"mtp.{n}.hc_ffn", streams, c)
        y = stage.experts(stage.norm("ffn_norm", read(streams, con.pre)))
        streams = written(streams, y, con)
    states = head_mixed(tensors, begun.last, streams, c)
    return ended(
        tensors, c, begun.last, head, states, newest, "markov_head.markov_w1", "markov_head.markov_w2"
    )


def head_mixed(
    tensors: dict[str, torch.Tensor], prefix: str, streams: torch.Tensor, c: dict[str, Any]
) -> torch.Tensor:
    """What V4's head reads of streams `[rows, hc, hidden]`."""
    fn, base, scale = (tensors[f"{prefix}.hc_head_{part}"].double() for part in ("fn", "base", "scale"))
    flat = streams.flatten(1)
    m = flat @ fn.T / torch.sqrt(flat.square().mean(1, keepdim=True) + c["rms_norm_eps"])
    return read(streams, torch.sigmoid(m * scale + base) + c["hc_eps"])


def chained(
    states: torch.Tensor,
    base: torch.Tensor,
    newest: int,
    markov_embed: torch.Tensor,
    markov_head: torch.Tensor,
    confidence: torch.Tensor,
) -> Block:
    """The last stage's heads, from the left to the right."""
    token, ids, logits, sure = newest, [], [], []
    for place in range(len(base)):
        said = markov_embed[token].double()
        logits.append(base[place] + markov_head.double() @ said)
        sure.append(torch.sigmoid(confidence[0].double() @ torch.cat((states[place], said))))
        token = int(logits[-1].argmax())
        ids.append(token)
    return Block(ids, torch.stack(logits), torch.stack(sure))


def v4_layer(
    tensors: dict[str, torch.Tensor],
    c: dict[str, Any],
    embed: torch.Tensor,
    head: torch.Tensor,
    streams: torch.Tensor,
    behind: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """V4's `mtp.0` (its specification, section 6): logits of every token with its streams
    `[tokens, hc, hidden]` and the token behind it, and the streams that leave the block. Whole sequence."""
    prefix = "mtp.0"
    stage = Stage(tensors, prefix, c, tile=128, top_k=c["num_experts_per_tok"], norms_queries=True)
    e = stage.norm("enorm", embed[list(behind)].double()) @ stage.matrix("e_proj").T
    h = stage.norm("hnorm", streams.double()) @ stage.matrix("h_proj").T
    streams = h + e.unsqueeze(1)
    positions = torch.arange(len(streams))
    ages = positions.unsqueeze(1) - positions
    visible = (ages >= 0) & (ages < c["sliding_window"])
    con = connection(tensors, f"{prefix}.hc_attn", streams, c)
    x = stage.norm("attn_norm", read(streams, con.pre))
    nothing = torch.empty(0, c["head_dim"], dtype=torch.float64)
    streams = written(streams, stage.attention(x, positions, nothing, visible), con)
    con = connection(tensors, f"{prefix}.hc_ffn", streams, c)
    streams = written(streams, stage.experts(stage.norm("ffn_norm", read(streams, con.pre))), con)
    mixed = head_mixed(tensors, prefix, streams, c)
    return stage.norm("norm", mixed) @ head.double().T, streams
