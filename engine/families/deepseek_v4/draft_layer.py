"""V4's draft layer (MTP, `mtp.0`): a block with a window alone, on the streams that leave the last layer.

For a token whose streams are known, and the token behind it, the block computes with streams that are made of
both; its own mix and norm, and the model's head, give the logits of the token after that.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from engine.families.base import NO_TRACE, Batch, KvCache, ModelInfo
from engine.families.decoder.draft_forward import DraftStep
from engine.families.deepseek_v4.config import V4Config
from engine.families.deepseek_v4.eager import V4Eager
from engine.families.deepseek_v4.forward import DeepseekV4, V4Cache
from engine.families.deepseek_v4.operations import V4Operations
from engine.families.deepseek_v4.recorded import V4Recorded
from engine.families.deepseek_v4.tensors import expect_head_mix, expect_layer
from engine.families.deepseek_v4.weights import V4Weights, read_head_mix, read_layer
from engine.families.streams.draft_stages import stage_bytes, stage_experts
from engine.families.streams.dspark import stage_count, stages_of
from engine.families.streams.operations import MAX_ROWS
from engine.families.streams.reader import Reader
from engine.families.streams.stored import Expectations
from engine.layers.operations import Value
from memory.checkpoint.checkpoint import Checkpoint
from memory.checkpoint.entries import TensorSpec
from quant.kernels.cpu.program import Buffer
from quant.kernels.cpu.recorder import Recorder
from quant.kernels.interface import Kernels, Weight


@dataclass(frozen=True)
class Combining:
    """What makes the block's streams: `[hidden, hidden]` each, after norms `[hidden]`."""

    of_embedding: torch.Tensor
    of_streams: torch.Tensor
    embedding: Weight
    streams: Weight


def has_draft_layer(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint has this kind of draft layer, and not DSpark's stages."""
    return stage_count(checkpoint) == 1 and "mtp.0.e_proj.weight" in checkpoint.entries


def draft_layer_bytes(checkpoint: Checkpoint) -> int:
    """Bytes that it takes in memory; 0 where there is none."""
    return stage_bytes(checkpoint) if has_draft_layer(checkpoint) else 0


def _expected(c: V4Config, checkpoint: Checkpoint) -> dict[str, TensorSpec]:
    """Its tensors, as `stages_of` names them."""
    expect = Expectations(checkpoint)
    expect_layer(c, expect, 0)
    for name in ("e_proj", "h_proj"):
        expect.dense(f"layers.0.{name}", c.hidden_size, c.hidden_size)
    for name in ("enorm", "hnorm", "norm"):
        expect.floats(f"layers.0.{name}.weight", c.hidden_size)
    expect_head_mix(c, expect, "layers.0.hc_head")
    return expect.specs


def read_draft_layer(model: DeepseekV4, checkpoint: Checkpoint, kernels: Kernels) -> V4DraftLayer:
    """The draft layer of the checkpoint that `model` was read from, in host memory.

    Raises CheckpointError listing everything that is wrong with its tensors.
    """
    c = replace(model.config, ratios=(0,), hashed_layers=0)
    checkpoint = stages_of(checkpoint)
    checkpoint.verify(_expected(c, checkpoint))
    reader = Reader(checkpoint, kernels)
    weights = V4Weights(
        embed=model.weights.embed,
        norm=reader.small("layers.0.norm.weight"),
        head=model.weights.head,
        layers=(read_layer(c, reader, 0, None),),
        experts=stage_experts(c, checkpoint, 1, kernels),
        places=model.weights.places,
        hc_head=read_head_mix(c, reader, "layers.0.hc_head"),
    )
    combining = Combining(
        reader.small("layers.0.enorm.weight"),
        reader.small("layers.0.hnorm.weight"),
        reader.dense("layers.0.e_proj", c.hidden_size, c.hidden_size),
        reader.dense("layers.0.h_proj", c.hidden_size, c.hidden_size),
    )
    return V4DraftLayer(c, model.info, weights, kernels, combining)


class V4DraftLayer(DeepseekV4):
    """The draft layer, loaded; a state is a token's streams, `[tokens, hc * hidden]`."""

    def __init__(
        self, config: V4Config, info: ModelInfo, weights: V4Weights, kernels: Kernels, combining: Combining
    ) -> None:
        super().__init__(config, info, weights, kernels, "float32")
        self._combining = combining
        self._embedding: dict[V4Recorded, Buffer] = {}  # of programs that do not read it themselves

    @torch.inference_mode()
    def step(self, batch: Batch, hidden: torch.Tensor, cache: KvCache) -> DraftStep:
        """A step of a batch whose ids are the tokens behind those of `hidden`."""
        assert isinstance(cache, V4Cache)
        for segment in batch.segments:
            cache.admit(segment)
        decoder = cache.decoder
        if isinstance(decoder, V4Recorded) and len(batch.ids) <= MAX_ROWS:
            assert decoder.program is not None
            decoder.program.source[: len(batch.ids)] = hidden
            if decoder in self._embedding:
                rows = self.weights.embed[batch.token_ids].float()
                decoder.program.rows(self._embedding[decoder])[: len(rows)] = rows
            logits, states = decoder.replay(batch), decoder.captured_rows(len(batch.ids))
        else:
            embedded = self.weights.embed[batch.token_ids].float()
            with V4Eager(self.parts, batch, cache, NO_TRACE) as ops:
                states = self._through(ops, self._combined(ops, embedded, hidden))
                logits = self._logits(ops, states[batch.logit_rows])
        for segment in batch.segments:
            cache.advance(segment)
        return DraftStep(logits, states[batch.logit_rows])

    def _record(self, recorder: Recorder, cache: V4Cache) -> V4Recorded:  # type: ignore[override]
        ops, embed = V4Recorded(self.parts, recorder, cache), self.weights.embed
        source = recorder.input(self.config.hc_mult * self.config.hidden_size)
        if isinstance(embed, torch.Tensor):
            embedded = recorder.embed(embed)
        else:
            embedded = self._embedding[ops] = recorder.input(self.config.hidden_size)
        streams = self._through(ops, self._combined(ops, embedded, source))
        ops.captured = [streams]
        recorder.keep(streams)
        ops.finish(source, self._logits(ops, streams))
        return ops

    def _combined(self, ops: V4Operations[Value], embedded: Value, hidden: Value) -> Value:
        """The block's streams, `[tokens, hc * hidden]`: each of the model's, and the embedding."""
        eps, hc, made = self.config.rms_norm_eps, self.config.hc_mult, self._combining
        (e,) = ops.linears(ops.norm(embedded, made.of_embedding, eps), made.embedding)
        h = ops.blocks(ops.norm_heads(hidden, made.of_streams, eps), (made.streams,) * hc)
        return ops.add(h, ops.streams(e, hc))
