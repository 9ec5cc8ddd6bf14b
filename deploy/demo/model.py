"""The V4.1 architecture as a training model: differentiable, over batches of packed documents.

Same arithmetic as the serving family (a test holds both to the same reference vectors), other
shape: whole rows at once, no cache, no packed weights. Parameters carry the names of the released
checkpoints, except that a layer's experts are stacked. Engram tables are not parameters: a step
touches few of their rows, so the caller gathers those and updates them itself (`tables.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attention import Attention, Geometry, Published
from engine.families.deepseek_v41.config import V41Config
from experts import RoutedExperts
from layers import Embedding, Linear, Precision, RmsNorm, fused
from quantise import straight_through


class HyperConnection(nn.Module):
    """mHC around one sublayer (spec section 3). Streams are `[hc, N, hidden]`, mixes `[hc, N]`.

    It starts near a plain residual: every stream takes the sublayer's output once, streams hardly
    mix, and the next sublayer reads mostly stream `favourite`, so that the streams come to differ.
    """

    def __init__(self, config: V41Config, favourite: int) -> None:
        super().__init__()
        hc = self.hc = config.hc_mult
        self.config = config
        self.fn = nn.Parameter(
            torch.randn((2 + hc) * hc, hc * config.hidden_size) * (hc * config.hidden_size) ** -0.5
        )
        base = torch.zeros((2 + hc) * hc)
        base[:hc] = -2.0
        base[favourite % hc] = 2.0
        base[2 * hc :] = 3.0 * torch.eye(hc).flatten()
        self.base = nn.Parameter(base)
        self.scale = nn.Parameter(torch.full((3,), 0.1))

    def forward(self, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """pre `[hc, N]`, post `[hc, N]`, combine `[hc, hc, N]`."""
        c = self.config
        return mixes(streams, self.fn, self.base, self.scale, c.rms_norm_eps, c.hc_eps, c.hc_sinkhorn_iters)


@fused
def mixes(
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, norm_eps: float, eps: float, iterations: int
) -> tuple[Tensor, Tensor, Tensor]:
    """pre, post, combine. Tokens lie along the last axis: each step is a few long vector operations."""
    hc, tokens, hidden = streams.shape
    m = torch.bmm(streams, fn.view(-1, hc, hidden).permute(1, 2, 0)).sum(0)  # [N, mixes]
    mean_square = streams.square().sum((0, 2)) / (hc * hidden)
    m = (m * torch.rsqrt(mean_square + norm_eps).unsqueeze(1)).t()  # [mixes, N]
    base = base.unsqueeze(1)
    pre = torch.sigmoid(m[:hc] * scale[0] + base[:hc]) + eps
    post = 2 * torch.sigmoid(m[hc : 2 * hc] * scale[1] + base[hc : 2 * hc])
    logits = (m[2 * hc :] * scale[2] + base[2 * hc :]).view(hc, hc, tokens)
    combine = logits.softmax(1) + eps
    combine = combine / (combine.sum(0, keepdim=True) + eps)
    for _ in range(iterations - 1):  # Sinkhorn
        combine = combine / (combine.sum(1, keepdim=True) + eps)
        combine = combine / (combine.sum(0, keepdim=True) + eps)
    return pre, post, combine


@fused
def read_streams(streams: Tensor, pre: Tensor) -> Tensor:
    """sum_i pre_i * H_i, `[N, hidden]`."""
    return (streams * pre.unsqueeze(-1)).sum(0)


@fused
def write_streams(streams: Tensor, y: Tensor, post: Tensor, combine: Tensor) -> Tensor:
    """H_j = post_j * y + sum_i combine[i, j] * H_i, `[hc, N, hidden]`."""
    carried = (combine.unsqueeze(-1) * streams.unsqueeze(1)).sum(0)
    return carried + post.unsqueeze(-1) * y


class Gate(nn.Module):
    """The router: sqrt(softplus) scores; a bias that only selects, moved by `train.py` without a loss."""

    def __init__(self, config: V41Config) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(
            torch.randn(config.n_routed_experts, config.hidden_size) * config.hidden_size**-0.5
        )
        self.bias: Tensor
        self.register_buffer("bias", torch.zeros(config.n_routed_experts))
        self.rounding = False

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Expert ids and weights, both `[N, top_k]`."""
        weight = straight_through(self.weight, "bf16") if self.rounding else self.weight
        scores = F.softplus(F.linear(x, weight)).sqrt()
        ids = (scores.detach() + self.bias).topk(self.config.num_experts_per_tok, dim=-1).indices
        weights = scores.gather(1, ids)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * self.config.routed_scaling_factor
        return ids, weights


class FeedForward(nn.Module):
    """Routed experts and the shared one (spec section 5)."""

    def __init__(self, config: V41Config) -> None:
        super().__init__()
        c = self.config = config
        width, hidden = c.moe_intermediate_size, c.hidden_size
        self.gate = Gate(c)
        self.experts_w13 = nn.Parameter(torch.randn(c.n_routed_experts, 2 * width, hidden) * hidden**-0.5)
        self.experts_w2 = nn.Parameter(torch.randn(c.n_routed_experts, hidden, width) * width**-0.5)
        shared = width * c.n_shared_experts
        self.shared_experts = nn.ModuleDict(
            {
                "w1": Linear(hidden, shared, "fp8"),
                "w3": Linear(hidden, shared, "fp8"),
                "w2": Linear(shared, hidden, "fp8"),
            }
        )
        self.rounding = False

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x `[N, hidden]` -> output, chosen ids and their weights."""
        ids, weights = self.gate(x)
        w13: Tensor = self.experts_w13
        w2: Tensor = self.experts_w2
        if self.rounding:
            w13, w2 = straight_through(w13, "fp4"), straight_through(w2, "fp4")
        limit = self.config.swiglu_limit
        routed = RoutedExperts.apply(x, weights, ids, w13, w2, limit, Precision.products)
        shared = self.shared_experts
        gate, up = shared["w1"](x), shared["w3"](x)
        y = shared["w2"](F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit))
        return routed + y, ids, weights


class Engram(nn.Module):
    """Reads table rows into the streams (spec section 7, "Use")."""

    def __init__(self, config: V41Config) -> None:
        super().__init__()
        self.config = config
        self.columns = (config.engram_max_ngram_size - 1) * config.engram_n_heads
        self.wkv = Linear(
            self.columns * config.engram_head_dim, config.hidden_size * (config.hc_mult + 1), "fp8"
        )
        self.q_weight = nn.Parameter(torch.ones(config.hc_mult, config.hidden_size))
        self.k_weight = nn.Parameter(torch.ones(config.hc_mult, config.hidden_size))

    def forward(self, streams: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Streams `[hc, N, hidden]` with the gated value added, and the gates `[hc, N]`."""
        kv = self.wkv(rows)  # [N, hidden * (hc + 1)]
        return add_gated(streams, kv, self.q_weight * self.k_weight, self.config.rms_norm_eps)


@fused
def add_gated(streams: Tensor, kv: Tensor, qk: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """kv `[N, hidden * (hc + 1)]`: a key for each stream, and the value that its gate scales."""
    hc, tokens, hidden = streams.shape
    key = kv[:, : hc * hidden].view(tokens, hc, hidden).transpose(0, 1)
    value = kv[:, hc * hidden :]
    dot = (streams * qk.unsqueeze(1) * key).sum(-1) * hidden**-0.5
    dot = dot * torch.rsqrt(streams.square().mean(-1) + eps)
    dot = dot * torch.rsqrt(key.square().mean(-1) + eps)
    gates = torch.sigmoid(dot.sign() * dot.abs().clamp(min=1e-6).sqrt())
    return streams + gates.unsqueeze(-1) * value, gates


class Layer(nn.Module):
    """One layer: Engram where it has one, attention, experts."""

    def __init__(self, config: V41Config, number: int) -> None:
        super().__init__()
        self.config, self.number = config, number
        self.attn_norm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.ffn_norm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.hc_attn = HyperConnection(config, 2 * number + 1)
        self.hc_ffn = HyperConnection(config, 2 * number + 2)
        self.attn = Attention(config, number)
        self.ffn = FeedForward(config)
        if number in config.engram_layer_ids:
            self.engram = Engram(config)


@dataclass
class Hidden:
    """What a forward gives: final states `[N, hidden]` (after the last norm), and what training watches."""

    states: Tensor
    router_ids: list[Tensor] = field(default_factory=list)  # per layer [N, top_k]
    index_losses: list[Tensor] = field(default_factory=list)


class Model(nn.Module):
    """The whole model."""

    def __init__(self, config: V41Config) -> None:
        super().__init__()
        self.config = config
        self.embed = Embedding(config.vocab_size, config.hidden_size, std=0.3)
        self.layers = nn.ModuleList(Layer(config, n) for n in range(config.num_hidden_layers))
        self.norm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.head = Linear(config.hidden_size, config.vocab_size, "bf16")
        self._calm_outputs()

    @torch.no_grad()
    def _calm_outputs(self) -> None:
        """Sublayer outputs start small, so that depth does not inflate the streams."""
        factor = (2 * self.config.num_hidden_layers) ** -0.5
        for layer in self.each_layer():
            layer.attn.wo_b.weight.mul_(factor)
            layer.ffn.experts_w2.mul_(factor)
            last = layer.ffn.shared_experts["w2"]
            assert isinstance(last, Linear)
            last.weight.mul_(factor)
        self.head.weight.mul_(0.5)

    def each_layer(self) -> Iterator[Layer]:
        """The layers in order; `layers` itself only promises modules."""
        return (layer for layer in self.layers if isinstance(layer, Layer))

    def set_rounding(self, on: bool) -> None:
        """Train on the numbers that the files will hold (fake quantisation), or on exact ones."""
        for module in self.modules():
            if hasattr(module, "rounding"):
                module.rounding = on  # type: ignore[assignment]  # its own; torch knows of tensors and modules

    def forward(
        self,
        ids: Tensor,
        documents: Tensor,
        engram_rows: list[Tensor],
        trace: dict[str, Tensor] | None = None,
    ) -> Hidden:
        """ids and documents `[B, T]`; engram_rows per Engram layer `[B * T, columns * dim]`.

        T is a multiple of the window, documents begin at multiples of every compress ratio, and
        padding has document -1. `trace`, where given, is filled with intermediate values.
        """
        c = self.config
        batch, length = ids.shape
        geometry = Geometry.of(c, documents)
        published = Published()
        embedded = self.embed(ids.flatten())  # [N, hidden]
        streams = embedded.expand(c.hc_mult, -1, -1)
        pre = torch.zeros(c.hc_mult, len(embedded))
        pre[0] = 1.0
        hidden = Hidden(embedded)
        for n, layer in enumerate(self.each_layer()):
            if n in c.engram_layer_ids:
                rows = engram_rows[c.engram_layer_ids.index(n)]
                streams, gates = layer.engram(streams, rows)
                _note(trace, f"engram_gate.{n}", gates.t())
            next_pre, post, combine = layer.hc_attn(streams)
            x = layer.attn_norm(read_streams(streams, pre))
            y = layer.attn(x.view(batch, length, -1), geometry, published, trace).flatten(0, 1)
            _note(trace, f"attn_out.{n}", y)
            streams, pre = write_streams(streams, y, post, combine), next_pre
            next_pre, post, combine = layer.hc_ffn(streams)
            x = layer.ffn_norm(read_streams(streams, pre))
            y, router_ids, router_weights = layer.ffn(x)
            streams, pre = write_streams(streams, y, post, combine), next_pre
            hidden.router_ids.append(router_ids)
            _note(trace, f"router_ids.{n}", router_ids)
            _note(trace, f"router_weights.{n}", router_weights)
            _note(trace, f"streams.{n}", streams.transpose(0, 1))
        hidden.states = self.norm(read_streams(streams, pre))
        hidden.index_losses = geometry.index_losses
        return hidden


def _note(trace: dict[str, Tensor] | None, name: str, value: Tensor) -> None:
    if trace is not None:
        trace[name] = value.detach()
