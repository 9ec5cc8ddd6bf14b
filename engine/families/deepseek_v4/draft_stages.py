"""The DSpark stages of a V4 checkpoint (releases that have them in place of `mtp.0`'s draft layer): what is
expected of their tensors, and how they are read.

They differ from V4.1's in what V4's layers differ in: heads of queries are normalised, each sublayer reads
the streams with its own mix, and the last stage has a mix for the head.
"""

from __future__ import annotations

from dataclasses import replace

from engine.families.deepseek_v4.config import V4Config
from engine.families.deepseek_v4.forward import DeepseekV4
from engine.families.deepseek_v4.tensors import expect_head_mix, expect_layer
from engine.families.deepseek_v4.weights import V4Weights, read_head_mix, read_layer
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
from quant.kernels.interface import Kernels

NAMES = MarkovNames("markov_w1", "markov_w2")


def stage_config(c: V4Config, shape: DSparkShape, stages: int) -> V4Config:
    """The stages as a model."""
    return replace(
        c,
        ratios=(0,) * stages,
        hashed_layers=0,
        n_routed_experts=shape.experts or c.n_routed_experts,
        num_experts_per_tok=shape.top_k or c.num_experts_per_tok,
        dspark=None,
    )


def expected_stage_tensors(c: V4Config, shape: DSparkShape, checkpoint: Checkpoint) -> dict[str, TensorSpec]:
    """Every tensor of the stages, as `stages_of` names them. c is the config of the stages."""
    expect = Expectations(checkpoint)
    for n in range(c.layers):
        expect_layer(c, expect, n)
    expect_head_mix(c, expect, f"layers.{c.layers - 1}.hc_head")
    expect_around(expect, c, shape, c.layers, NAMES)
    return expect.specs


def read_stages(model: DeepseekV4, checkpoint: Checkpoint, kernels: Kernels) -> DraftStages:
    """The stages of the checkpoint that `model` was read from, in host memory.

    Raises CheckpointError listing everything that is wrong with their tensors.
    """
    shape = model.config.dspark
    assert shape is not None
    c = stage_config(model.config, shape, stage_count(checkpoint))
    checkpoint = stages_of(checkpoint)
    checkpoint.verify(expected_stage_tensors(c, shape, checkpoint))
    reader, last = Reader(checkpoint, kernels), f"layers.{c.layers - 1}"
    weights = V4Weights(
        embed=model.weights.embed,
        norm=reader.small(f"{last}.norm.weight"),
        head=model.weights.head,
        layers=tuple(read_layer(c, reader, n, None) for n in range(c.layers)),
        experts=stage_experts(c, checkpoint, c.layers, kernels),
        places=model.weights.places,
        hc_head=read_head_mix(c, reader, f"{last}.hc_head"),
    )
    return read_around(reader, shape, DeepseekV4(c, model.info, weights, kernels, "float32"), NAMES)
