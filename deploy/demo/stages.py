"""DSpark draft stages for training: what they compute on the frozen model's states (spec section 9).

A stage is a layer that sees nothing but a window: of committed tokens it keys what the model captured, and
its own rows are those of a block: the newest token, and noise for the tokens to be drafted, all of which see
each other. Parameters carry the released names.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from attention import HIDDEN, Geometry, rotate
from engine.families.deepseek_v41.config import V41Config
from layers import Embedding, Linear, RmsNorm, linear
from model import Layer, Model, read_streams, write_streams


@dataclass(frozen=True)
class StageShape:
    """The keys of config.json that stages have besides the model's own."""

    stages: int = 1
    block_size: int = 5
    noise_token_id: int = 2  # padding: it stands in no text
    target_layer_ids: tuple[int, ...] = (3, 4, 5)
    markov_rank: int = 64
    experts: int = 8
    top_k: int = 2

    def keys(self) -> dict[str, object]:
        """As config.json spells them."""
        return {
            "num_nextn_predict_layers": self.stages,
            "dspark_block_size": self.block_size,
            "dspark_noise_token_id": self.noise_token_id,
            "dspark_target_layer_ids": list(self.target_layer_ids),
            "dspark_markov_rank": self.markov_rank,
            "dspark_n_routed_experts": self.experts,
            "dspark_num_experts_per_tok": self.top_k,
        }

    def config(self, config: V41Config) -> V41Config:
        """The stages as layers of a model of their own."""
        return replace(
            config,
            num_hidden_layers=self.stages,
            compress_ratios=(0,) * self.stages,
            kv_source_layer_ids=(),
            index_source_layer_ids=(),
            candidate_source_layer_id=-1,
            engram_layer_ids=(),
            engram_num_embeddings=(),
            n_routed_experts=self.experts,
            num_experts_per_tok=self.top_k,
        )


SHAPE = StageShape()


class MarkovHead(nn.Module):
    """What the token before says about a token, of low rank."""

    def __init__(self, vocab_size: int, rank: int) -> None:
        super().__init__()
        self.embed = Embedding(vocab_size, rank, std=0.3)
        self.head = Linear(rank, vocab_size, "bf16")
        with torch.no_grad():
            self.head.weight.mul_(0.1)


class ConfidenceHead(nn.Module):
    """How likely a drafted token is to be accepted, if those before it are."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.proj = Linear(inputs, 1, "bf16")


@dataclass(frozen=True)
class Anchors:
    """Blocks to be drafted: in row `row` `[n]` behind the committed token at `place` `[n]`."""

    row: Tensor
    place: Tensor


@dataclass(frozen=True)
class Drafted:
    """Of each anchor's block: states `[n, block, hidden]` before the last norm, logits `[n, block, vocab]`
    and the confidence's logits `[n, block]`."""

    states: Tensor
    logits: Tensor
    confidence: Tensor


class Stages(nn.Module):
    """All stages, and what surrounds them; the model's embedding and head are used as they are."""

    def __init__(self, config: V41Config, shape: StageShape = SHAPE) -> None:
        super().__init__()
        self.model_config, self.shape = config, shape
        self.config = c = shape.config(config)
        width = len(shape.target_layer_ids) * c.hidden_size
        self.main_proj = Linear(width, c.hidden_size, "fp8")
        self.main_norm = RmsNorm(c.hidden_size, c.rms_norm_eps)
        self.mtp = nn.ModuleList(Layer(c, n) for n in range(shape.stages))
        self.norm = RmsNorm(c.hidden_size, c.rms_norm_eps)
        self.markov_head = MarkovHead(c.vocab_size, shape.markov_rank)
        self.confidence_head = ConfidenceHead(c.hidden_size + shape.markov_rank)

    def each_stage(self) -> Iterator[Layer]:
        """The stages in order."""
        return (stage for stage in self.mtp if isinstance(stage, Layer))

    def set_rounding(self, on: bool) -> None:
        """Train on the numbers that the files will hold, or on exact ones."""
        for module in self.modules():
            if hasattr(module, "rounding"):
                module.rounding = on  # type: ignore[assignment]  # its own; torch knows of tensors and modules

    def forward(
        self, model: Model, captures: Tensor, ids: Tensor, documents: Tensor, anchors: Anchors
    ) -> Drafted:
        """captures `[B, T, targets * hidden]`, ids and documents `[B, T]`; each anchor's newest token and the
        block's drafts stand behind its place in the same row, and are what the Markov head is told came
        before."""
        c, block = self.config, self.shape.block_size
        window, length = c.sliding_window, ids.shape[1]
        geometry = Geometry.of(c, documents)
        cos, sin = geometry.rotations[False]
        main = self.main_norm(self.main_proj(captures))  # [B, T, hidden]

        row, place = anchors.row.unsqueeze(1), anchors.place.unsqueeze(1)
        seen = place + torch.arange(1 - window, 1)  # [n, window]
        hidden = (seen < 0) | (documents[row, seen.clamp(min=0)] != documents[row, place])
        bias = torch.zeros(len(row), window + block)
        bias[:, :window].masked_fill_(hidden, HIDDEN)
        flat_seen = (row * length + seen.clamp(min=0)).flatten()
        places = (place + 1 + torch.arange(block)).clamp(max=length - 1)  # [n, block]
        turn = cos[places].flatten(0, 1), sin[places].flatten(0, 1)  # of the block's rows

        drafted = torch.full((len(row), block), self.shape.noise_token_id)
        drafted[:, 0] = ids[anchors.row, places[:, 0]]
        embedded = model.embed(drafted.flatten())  # [n * block, hidden]
        streams = embedded.expand(c.hc_mult, -1, -1)
        pre = torch.zeros(c.hc_mult, len(embedded))
        pre[0] = 1.0
        for stage in self.each_stage():
            attn = stage.attn
            next_pre, post, combine = stage.hc_attn(streams)
            x = stage.attn_norm(read_streams(streams, pre))
            committed = rotate(attn.kv_norm(attn.wkv(main)), (cos, sin)).flatten(0, 1)
            q = attn.wq_b(attn.q_norm(attn.wq_a(x))).view(len(x), 1, attn.heads, attn.dim)
            q = _turned(q, turn).view(len(row), block * attn.heads, attn.dim)
            own = _turned(attn.kv_norm(attn.wkv(x)).unsqueeze(1), turn).view(len(row), block, attn.dim)
            keys = torch.cat((committed[flat_seen].view(len(row), window, attn.dim), own), dim=1)
            scores = torch.bmm(q * attn.dim**-0.5, keys.transpose(1, 2))  # [n, block * heads, window + block]
            scores = scores.view(len(row), block, attn.heads, -1) + bias[:, None, None]
            sink = attn.attn_sink.view(1, 1, -1, 1).expand(*scores.shape[:3], 1)
            weights = torch.cat((scores, sink), dim=-1).softmax(-1)[..., :-1]
            out = torch.bmm(weights.flatten(1, 2), keys).view(len(x), 1, attn.heads, attn.dim)
            out = _turned(out, turn, sign=-1.0).view(len(x), c.o_groups, -1)
            low = [linear(out[:, g], w) for g, w in enumerate(attn.wo_a.matrix().chunk(c.o_groups))]
            streams = write_streams(streams, attn.wo_b(torch.cat(low, dim=-1)), post, combine)
            pre = next_pre
            next_pre, post, combine = stage.hc_ffn(streams)
            y, _, _ = stage.ffn(stage.ffn_norm(read_streams(streams, pre)))
            streams, pre = write_streams(streams, y, post, combine), next_pre
        states = read_streams(streams, pre)

        before = ids[anchors.row.unsqueeze(1), places]  # [n, block]
        said = self.markov_head.embed(before.flatten())  # [n * block, rank]
        logits = model.head(self.norm(states)) + self.markov_head.head(said)
        confidence = self.confidence_head.proj(torch.cat((states, said), dim=1).detach())
        shape = len(row), block
        return Drafted(states.view(*shape, -1), logits.view(*shape, -1), confidence.view(shape))

    @torch.no_grad()
    def chain(self, model: Model, drafted: Drafted, newest: Tensor) -> Tensor:
        """The tokens that are drafted `[n, block]`, each knowing the one before; `newest` `[n]`."""
        base = model.head(self.norm(drafted.states))
        found, token = [], newest
        for i in range(self.shape.block_size):
            token = (base[:, i] + self.markov_head.head(self.markov_head.embed(token))).argmax(1)
            found.append(token)
        return torch.stack(found, dim=1)


def _turned(x: Tensor, turn: tuple[Tensor, Tensor], sign: float = 1.0) -> Tensor:
    """Rows x `[rows, 1, ..., dim]`, each at its own position."""
    return rotate(x.unsqueeze(0).flatten(1, 2), turn, sign).view_as(x)
