"""The DSpark stages of a V4.1 checkpoint: what is expected of their tensors, and how they are read."""

from __future__ import annotations

from dataclasses import replace

import torch

from engine.families.deepseek_v41.config import V41Config
from engine.families.deepseek_v41.forward import DeepseekV41
from engine.families.deepseek_v41.weights import V41Weights, read_layer
from engine.families.streams.draft_stages import (
    DraftStages,
    MarkovNames,
    expect_around,
    read_around,
    stage_experts,
)
from engine.families.streams.dspark import DSparkShape, stage_count, stages_of
from engine.families.streams.reader import Reader
from engine.families.streams.stored import Expectations
from memory.checkpoint.checkpoint import Checkpoint
from memory.checkpoint.entries import TensorSpec
from memory.engram.store import EngramStore
from memory.telemetry import Telemetry
from quant.kernels.interface import Kernels

NAMES = MarkovNames("embed", "head")


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
    expect_around(expect, c, shape, c.num_hidden_layers, NAMES)
    return expect.specs


def read_stages(model: DeepseekV41, checkpoint: Checkpoint, kernels: Kernels) -> DraftStages:
    """The stages of the checkpoint that `model` was read from, in host memory.

    Raises CheckpointError listing everything that is wrong with their tensors.
    """
    shape = model.config.dspark
    assert shape is not None
    c = stage_config(model.config, shape, stage_count(checkpoint))
    checkpoint = stages_of(checkpoint)
    checkpoint.verify(expected_stage_tensors(c, shape, checkpoint))
    reader, stages = Reader(checkpoint, kernels), c.num_hidden_layers
    weights = V41Weights(
        embed=model.weights.embed,
        norm=reader.small(f"layers.{stages - 1}.norm.weight"),
        head=model.weights.head,
        layers=tuple(read_layer(c, reader, n) for n in range(stages)),
        experts=stage_experts(c, checkpoint, stages, kernels),
        places=model.weights.places,
        engram=EngramStore({}, checkpoint, kernels, {}, Telemetry()),
    )
    no_map = torch.zeros(0, dtype=torch.int64)
    layers = DeepseekV41(c, model.info, weights, no_map, kernels, None, "float32")
    return read_around(reader, shape, layers, NAMES)
