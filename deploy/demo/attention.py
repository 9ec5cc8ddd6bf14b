"""V4.1 attention for training: whole rows of packed documents at once (spec section 4).

Of the compressed entries that a block of queries can see, all are scored and the unselected ones
masked: at these sizes cheaper than gathering each token's selection (`blocks.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from blocks import BlockAttention, IndexScores, Span, spans_of
from engine.families.deepseek_v41.config import V41Config
from engine.layers.rope import inverse_frequencies
from layers import Linear, Precision, RmsNorm, fused, linear

HIDDEN = -1e30  # finite, so that rows that see nothing at all (padding) stay free of NaN


@dataclass
class Entries:
    """What a kv source publishes: latents `[B, G, head_dim]`, index keys `[B, G, index_dim]`, who sees it."""

    latents: Tensor
    index_keys: Tensor
    visible: Tensor  # [B, T, G] bool


@dataclass
class Published:
    """What layers leave for later ones: the latest source's entries, its selection, the candidates.

    bias `[B, T, G]`: 0 for selected entries, HIDDEN for others; pool `[B, T, G]` bool.
    """

    entries: Entries | None = None
    bias: Tensor | None = None
    pool: Tensor | None = None


@dataclass
class Geometry:
    """What all layers share about a batch of packed rows.

    documents `[B, T]` int64: which document of the row a token belongs to, -1 for padding.
    rotations: layer kind -> (cos, sin), each `[T, rope_dim / 2]`
    window_bias `[B, T, 2 * window]`: 0 or HIDDEN, for the keys of the block before a token's own, and that
    """

    documents: Tensor
    rotations: dict[bool, tuple[Tensor, Tensor]]
    window_bias: Tensor
    window: int
    index_losses: list[Tensor] = field(default_factory=list)
    _spans: dict[int, list[Span]] = field(default_factory=dict)

    @classmethod
    def of(cls, config: V41Config, documents: Tensor) -> Geometry:
        batch, length = documents.shape
        window = config.sliding_window
        assert length % window == 0, "rows are padded to a multiple of the window"
        position = torch.arange(length, dtype=torch.float64).unsqueeze(1)
        rotations = {}
        for compressing in (False, True):
            theta = config.compress_rope_theta if compressing else config.rope_theta
            yarn = config.yarn if compressing else None
            angles = position * inverse_frequencies(config.qk_rope_head_dim, theta, yarn)
            rotations[compressing] = (angles.cos().float(), angles.sin().float())
        mine = documents.view(batch, -1, window)  # [B, blocks, W]
        seen = with_block_before(mine, -2)  # [B, blocks, 2W]
        query = torch.arange(window).unsqueeze(1) + window
        key = torch.arange(2 * window)
        near = (key <= query) & (key > query - window)
        same = mine.unsqueeze(-1) == seen.unsqueeze(-2)
        bias = torch.zeros(same.shape).masked_fill_(~(same & near), HIDDEN)
        return cls(documents, rotations, bias.view(batch, length, 2 * window), window)

    def spans(self, ratio: int) -> list[Span]:
        """Blocks of queries and the entries of a source with `ratio` that each may need; 0: no entries."""
        if ratio not in self._spans:
            self._spans[ratio] = spans_of(self.documents, self.window, ratio)
        return self._spans[ratio]

    def visible(self, ratio: int) -> Tensor:
        """Which entries of a source with `ratio` each token may see, `[B, T, G]`: complete, same document."""
        length = self.documents.shape[1]
        groups = length // ratio
        first = self.documents[:, : groups * ratio : ratio]  # documents start at multiples of every ratio
        same = self.documents.unsqueeze(-1) == first.unsqueeze(1)
        complete = (torch.arange(groups) + 1) * ratio <= torch.arange(length).unsqueeze(1) + 1
        return same & complete


def with_block_before(blocks: Tensor, fill: float) -> Tensor:
    """`[B, blocks, W, ...]` -> `[B, blocks, 2W, ...]`: each block behind the one before it."""
    before = torch.cat((torch.full_like(blocks[:, :1], fill), blocks[:, :-1]), dim=1)
    return torch.cat((before, blocks), dim=2)


@fused
def rotate(x: Tensor, rotation: tuple[Tensor, Tensor], sign: float = 1.0) -> Tensor:
    """Turn the last channels of x `[B, T, ..., channels]`, in interleaved pairs; sign -1 turns back."""
    cos, sin = rotation
    pairs = cos.shape[-1]
    shape = (cos.shape[0], *(1,) * (x.dim() - 3), pairs)
    cos, sin = cos.view(shape), sin.view(shape) * sign
    plain, turning = x[..., : -2 * pairs], x[..., -2 * pairs :]
    even, odd = turning.unflatten(-1, (pairs, 2)).unbind(-1)
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
    return torch.cat((plain, turned), dim=-1)


class Compressor(nn.Module):
    """A kv source's compressed entries: one per `ratio` tokens (section 4.3)."""

    def __init__(self, config: V41Config, ratio: int) -> None:
        super().__init__()
        self.ratio = ratio
        self.wkv = Linear(config.hidden_size, config.head_dim, "bf16")
        if ratio > 1:
            self.wgate = Linear(config.hidden_size, config.head_dim, "bf16")
        self.norm = RmsNorm(config.head_dim, config.rms_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        groups = x.shape[1] // self.ratio
        x = x[:, : groups * self.ratio]
        latents = self.wkv(x)
        if self.ratio > 1:
            latents = latents.unflatten(1, (groups, self.ratio))
            shares = self.wgate(x).unflatten(1, (groups, self.ratio)).softmax(2)
            latents = (latents * shares).sum(2)
        return self.norm(latents)  # [B, G, head_dim], not yet rotated


class Indexer(nn.Module):
    """Scores compressed entries (section 4.4).

    Choosing has no gradient, so the indexer learns from the attention it serves: its scores, as a
    distribution over the visible entries, are pulled (KL divergence) towards what the heads
    together attend to, and its inputs are detached, so that nothing else feels this loss.
    """

    def __init__(self, config: V41Config, owns_keys: bool) -> None:
        super().__init__()
        self.heads, self.dim = config.index_n_heads, config.index_head_dim
        self.wq_b = Linear(config.q_lora_rank, self.heads * self.dim, "fp8")
        self.weights_proj = Linear(config.hidden_size, self.heads, "bf16")
        if owns_keys:
            self.wk = Linear(config.head_dim, self.dim, "bf16")
            self.k_norm = RmsNorm(self.dim, config.rms_norm_eps)

    def keys(self, latents: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        return rotate(self.k_norm(self.wk(latents.detach())), rotation)

    def forward(
        self, x: Tensor, qr: Tensor, keys: Tensor, spans: list[Span], rotation: tuple[Tensor, Tensor]
    ) -> Tensor:
        """`[B, T, G]`."""
        x, qr = x.detach(), qr.detach()
        batch, length, _ = x.shape
        queries = rotate(self.wq_b(qr).view(batch, length, self.heads, self.dim), rotation)
        weights = self.weights_proj(x) * (self.dim**-0.5 * self.heads**-0.5)  # [B, T, ih]
        return IndexScores.apply(queries, weights, keys, spans, Precision.products)


def best(scores: Tensor, top_k: int) -> Tensor:
    """Mask of the `top_k` best scores of each row that are not -inf."""
    if scores.shape[-1] <= top_k:
        return scores > -torch.inf
    values, columns = scores.topk(top_k, dim=-1)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, columns, values > -torch.inf)


def candidate_pool(scores: Tensor, block: int, top_blocks: int) -> Tensor:
    """Entries in the best blocks, mask like scores; the newest visible entry's block always wins."""
    entries = scores.shape[-1]
    blocks = -(-entries // block)
    padded = torch.nn.functional.pad(scores, (0, blocks * block - entries), value=-torch.inf)
    ranks = padded.unflatten(-1, (blocks, block)).amax(-1)  # [B, T, blocks]
    visible = scores > -torch.inf
    newest = (visible * torch.arange(1, entries + 1)).amax(-1, keepdim=True)  # 0 where nothing is visible
    won = torch.where(newest > 0, torch.inf, -torch.inf)
    ranks = ranks.scatter(-1, (newest - 1).clamp(min=0) // block, won)
    return best(ranks, top_blocks).repeat_interleave(block, dim=-1)[..., :entries]


class Attention(nn.Module):
    """One attention sublayer of any kind: window only, full, reindex or reuse."""

    def __init__(self, config: V41Config, number: int) -> None:
        super().__init__()
        self.config, self.number = config, number
        c = config
        self.heads, self.dim = c.num_attention_heads, c.head_dim
        self.source = c.kv_source_of(number)
        query_dim = self.heads * self.dim
        self.wq_a = Linear(c.hidden_size, c.q_lora_rank, "fp8")
        self.q_norm = RmsNorm(c.q_lora_rank, c.rms_norm_eps)
        self.wq_b = Linear(c.q_lora_rank, query_dim, "fp8")
        self.wkv = Linear(c.hidden_size, self.dim, "fp8")
        self.kv_norm = RmsNorm(self.dim, c.rms_norm_eps)
        self.attn_sink = nn.Parameter(torch.zeros(self.heads))
        self.wo_a = Linear(query_dim // c.o_groups, c.o_groups * c.o_lora_rank, "fp8")
        self.wo_b = Linear(c.o_groups * c.o_lora_rank, c.hidden_size, "fp8")
        if number in c.kv_source_layer_ids:
            self.compressor = Compressor(c, c.compress_ratios[number])
        if number in c.index_source_layer_ids:
            self.indexer = Indexer(c, owns_keys=number in c.kv_source_layer_ids)

    def forward(
        self, x: Tensor, geometry: Geometry, published: Published, trace: dict[str, Tensor] | None
    ) -> Tensor:
        """`[B, T, hidden]` to the same. `published` carries entries, selection and pool to later layers."""
        batch, length, _ = x.shape
        rotation = geometry.rotations[self.source is not None]
        qr = self.q_norm(self.wq_a(x))
        q = rotate(self.wq_b(qr).view(batch, length, self.heads, self.dim), rotation)
        kv = rotate(self.kv_norm(self.wkv(x)), rotation)  # [B, T, dim]
        scores = None
        if self.source is not None:
            scores = self._publish(x, qr, geometry, published, trace)
        out, attended = self._attend(q, kv, geometry, published)
        if scores is not None and self.training:
            assert published.entries is not None
            geometry.index_losses.append(self._index_loss(scores, attended, published.entries.visible))
        out = rotate(out, rotation, sign=-1.0)
        c = self.config
        groups = out.flatten(2).view(batch, length, c.o_groups, -1)
        blocks = self.wo_a.matrix().chunk(c.o_groups)
        low = [linear(groups[:, :, g], w) for g, w in enumerate(blocks)]
        return self.wo_b(torch.cat(low, dim=-1))

    def _publish(
        self, x: Tensor, qr: Tensor, geometry: Geometry, published: Published, trace: dict[str, Tensor] | None
    ) -> Tensor | None:
        """Compress, index and select where this layer is a source; returns its index scores."""
        c = self.config
        ratio = c.compress_ratios[self.number]
        rotation = geometry.rotations[True]
        if self.number in c.kv_source_layer_ids:
            latents = self.compressor(x)
            groups = latents.shape[1]
            at_group = (rotation[0][: groups * ratio : ratio], rotation[1][: groups * ratio : ratio])
            keys = self.indexer.keys(latents, at_group)
            published.entries = Entries(rotate(latents, at_group), keys, geometry.visible(ratio))
        if self.number not in c.index_source_layer_ids:
            return None
        entries = published.entries
        assert entries is not None
        scores = self.indexer(x, qr, entries.index_keys, geometry.spans(ratio), rotation)
        ranked = scores.detach().masked_fill(~entries.visible, -torch.inf)
        if published.pool is not None:
            ranked = ranked.masked_fill(~published.pool, -torch.inf)
        chosen = best(ranked, c.index_topk)
        if self.number == c.candidate_source_layer_id:
            published.pool = candidate_pool(ranked, c.candidate_block_size, c.candidate_topk_blocks)
        published.bias = torch.zeros(chosen.shape).masked_fill_(~chosen, HIDDEN)
        if trace is not None:
            trace[f"index_selected.{self.number}"] = chosen
        return scores

    def _attend(
        self, q: Tensor, kv: Tensor, geometry: Geometry, published: Published
    ) -> tuple[Tensor, Tensor]:
        """Attention output `[B, T, heads, dim]`, and the heads' summed weights on entries `[B, T, G]`."""
        batch, length = kv.shape[:2]
        latents, selection = kv.new_zeros(batch, 0, self.dim), kv.new_zeros(batch, length, 0)
        ratio = 0
        if self.source is not None:
            assert published.entries is not None
            assert published.bias is not None
            latents, selection = published.entries.latents, published.bias
            ratio = self.config.compress_ratios[self.number]
        spans, window_bias = geometry.spans(ratio), geometry.window_bias
        q, sink = q * self.dim**-0.5, self.attn_sink
        return BlockAttention.apply(q, kv, latents, sink, window_bias, selection, spans, Precision.products)

    @staticmethod
    def _index_loss(scores: Tensor, attended: Tensor, visible: Tensor) -> Tensor:
        """KL(attention over selected entries || softmax of index scores), mean over tokens that see any."""
        total = attended.sum(-1, keepdim=True)
        target = attended / total.clamp(min=1e-9)
        log_scores = scores.masked_fill(~visible, HIDDEN).log_softmax(-1)
        divergence = (torch.special.xlogy(target, target) - target * log_scores).sum(-1)
        seeing = total.squeeze(-1) > 1e-6
        return (divergence * seeing).sum() / seeing.sum().clamp(min=1)
