"""The DSpark stages of a V4.1 checkpoint: what is expected of their tensors, and how they are read.

A stage is a layer that sees its window alone, with experts of its own. So all stages together are read, and
computed, as a model of that many layers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from engine.families.deepseek_v41.config import V41Config
from engine.families.deepseek_v41.forward import DeepseekV41
from engine.families.deepseek_v41.weights import V41Weights, read_layer
from engine.families.places import HOST
from engine.families.streams.dspark import DSparkShape, stage_count, stages_of
from engine.families.streams.experts import StreamExpertFiles
from engine.families.streams.reader import Reader
from engine.families.streams.stored import Expectations
from memory.checkpoint.checkpoint import Checkpoint
from memory.checkpoint.entries import TensorSpec
from memory.engram.store import EngramStore
from memory.experts.store import ExpertStore
from memory.telemetry import Telemetry
from memory.tiers import Tier
from quant.kernels.interface import Kernels, Weight

# What slots of experts take beyond the file's bytes: they begin at cache lines.
ALIGNED = 1.02
LEAST_BYTES = 8_000_000


@dataclass(frozen=True)
class DraftStages:
    """Stages, ready to compute.

    layers      the stages as a model, with the embedding and the head of the model that they draft for
    main_proj, main_norm  make of what is captured what stages key: `[hidden, targets * hidden]`, `[hidden]`
    norm        before the head
    markov_embed, markov_head  `[vocab, rank]`: what the token before adds to a token's logits
    confidence  `[1, hidden + rank]`
    """

    shape: DSparkShape
    layers: DeepseekV41
    main_proj: Weight
    main_norm: torch.Tensor
    norm: torch.Tensor
    markov_embed: torch.Tensor
    markov_head: torch.Tensor
    confidence: torch.Tensor

    @property
    def stages(self) -> int:
        """How many there are."""
        return self.layers.config.num_hidden_layers


def stage_config(c: V41Config, shape: DSparkShape, stages: int) -> V41Config:
    """The stages as a model."""
    return replace(
        c,
        num_hidden_layers=stages,
        compress_ratios=(0,) * stages,
        kv_source_layer_ids=(),
        index_source_layer_ids=(),
        candidate_source_layer_id=-1,
        engram_layer_ids=(),
        engram_num_embeddings=(),
        n_routed_experts=shape.experts or c.n_routed_experts,
        num_experts_per_tok=shape.top_k or c.num_experts_per_tok,
        dspark=None,
    )


def expected_stage_tensors(c: V41Config, shape: DSparkShape, checkpoint: Checkpoint) -> dict[str, TensorSpec]:
    """Every tensor of the stages, as `stages_of` names them. c is the config of the stages."""
    expect = Expectations(checkpoint)
    for n in range(c.num_hidden_layers):
        layer = f"layers.{n}"
        expect.sublayers(c, layer)
        expect.attention(c, f"{layer}.attn")
        expect.floats(f"{layer}.attn.attn_sink", c.num_attention_heads)
        expect.floats(f"{layer}.ffn.gate.weight", c.n_routed_experts, c.hidden_size)
        expect.floats(f"{layer}.ffn.gate.bias", c.n_routed_experts)
        if f"{layer}.ffn.gate.bias_vl" in checkpoint.entries:  # drafts are of text alone
            expect.floats(f"{layer}.ffn.gate.bias_vl", c.n_routed_experts)
        expect.experts(c, layer, c.n_routed_experts)
    last = f"layers.{c.num_hidden_layers - 1}"
    expect.dense("layers.0.main_proj", c.hidden_size, len(shape.target_layer_ids) * c.hidden_size)
    expect.floats("layers.0.main_norm.weight", c.hidden_size)
    expect.floats(f"{last}.norm.weight", c.hidden_size)
    for part in ("embed", "head"):
        expect.floats(f"{last}.markov_head.{part}.weight", c.vocab_size, shape.markov_rank)
    expect.floats(f"{last}.confidence_head.proj.weight", 1, c.hidden_size + shape.markov_rank)
    return expect.specs


def stage_bytes(checkpoint: Checkpoint) -> int:
    """Bytes that a checkpoint's stages take in memory; 0 where it has none."""
    entries = stages_of(checkpoint).entries.values()
    held = sum(entry.nbytes for entry in entries)
    return int(held * ALIGNED) + LEAST_BYTES if held else 0


def read_stages(model: DeepseekV41, checkpoint: Checkpoint, kernels: Kernels) -> DraftStages:
    """The stages of the checkpoint that `model` was read from, in host memory.

    Raises CheckpointError listing everything that is wrong with their tensors.
    """
    shape = model.config.dspark
    assert shape is not None
    c = stage_config(model.config, shape, stage_count(checkpoint))
    checkpoint = stages_of(checkpoint)
    checkpoint.verify(expected_stage_tensors(c, shape, checkpoint))
    reader, files = Reader(checkpoint, kernels), StreamExpertFiles.of(c, checkpoint, c.num_hidden_layers)
    of_experts = sum(entry.nbytes for name, entry in checkpoint.entries.items() if ".ffn.experts." in name)
    tier = Tier("dram", int(of_experts * ALIGNED) + LEAST_BYTES, HOST)
    last = f"layers.{c.num_hidden_layers - 1}"
    weights = V41Weights(
        embed=model.weights.embed,
        norm=reader.small(f"{last}.norm.weight"),
        head=model.weights.head,
        layers=tuple(read_layer(c, reader, n) for n in range(c.num_hidden_layers)),
        experts=ExpertStore(files, kernels, tier),
        places=model.weights.places,
        engram=EngramStore({}, checkpoint, kernels, {}, Telemetry()),
    )
    no_map = torch.zeros(0, dtype=torch.int64)
    return DraftStages(
        shape=shape,
        layers=DeepseekV41(c, model.info, weights, no_map, kernels, None, "float32"),
        main_proj=reader.dense(
            "layers.0.main_proj", c.hidden_size, len(shape.target_layer_ids) * c.hidden_size
        ),
        main_norm=reader.small("layers.0.main_norm.weight"),
        norm=weights.norm,
        markov_embed=reader.plain(f"{last}.markov_head.embed.weight"),
        # In memory as the recorder wants it, so that it need not copy it.
        markov_head=reader.plain(f"{last}.markov_head.head.weight").t().contiguous().t(),
        confidence=reader.small(f"{last}.confidence_head.proj.weight"),
    )
