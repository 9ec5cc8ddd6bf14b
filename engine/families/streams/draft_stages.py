"""DSpark's stages of V4 and V4.1, once they are read: a model of so many layers, and what is around it.

A stage is a layer that sees its window alone, with experts of its own. So all stages together are read, and
computed, as a model of that many layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from engine.families.places import HOST
from engine.families.streams.config import StreamConfig
from engine.families.streams.dspark import DSparkShape, stages_of
from engine.families.streams.experts import StreamExpertFiles
from engine.families.streams.forward import StreamModel
from engine.families.streams.reader import Reader
from engine.families.streams.stored import Expectations
from memory.checkpoint.checkpoint import Checkpoint
from memory.experts.store import ExpertStore
from memory.tiers import Tier
from quant.kernels.interface import Kernels, Weight

# What slots of experts take beyond the file's bytes: they begin at cache lines.
ALIGNED = 1.02
LEAST_BYTES = 8_000_000


@dataclass(frozen=True)
class DraftStages:
    """Stages, ready to compute.

    layers      the stages as a model, with the embedding and the head of the model that they draft for, and
                with a norm before the head of their own
    main_proj, main_norm  make of what is captured what stages key: `[hidden, targets * hidden]`, `[hidden]`
    markov_embed, markov_head  `[vocab, rank]`: what the token before adds to a token's logits
    confidence  `[1, hidden + rank]`
    """

    shape: DSparkShape
    layers: StreamModel
    main_proj: Weight
    main_norm: torch.Tensor
    markov_embed: torch.Tensor
    markov_head: torch.Tensor
    confidence: torch.Tensor


class MarkovNames(NamedTuple):
    """What a family calls the parts of the Markov head."""

    embed: str
    head: str


def stage_bytes(checkpoint: Checkpoint) -> int:
    """Bytes that a checkpoint's stages take in memory; 0 where it has none."""
    held = sum(entry.nbytes for entry in stages_of(checkpoint).entries.values())
    return int(held * ALIGNED) + LEAST_BYTES if held else 0


def expect_around(
    expect: Expectations, c: StreamConfig, shape: DSparkShape, stages: int, names: MarkovNames
) -> None:
    """Tensors around the stages' layers, as `stages_of` names them."""
    last = f"layers.{stages - 1}"
    expect.dense("layers.0.main_proj", c.hidden_size, len(shape.target_layer_ids) * c.hidden_size)
    expect.floats("layers.0.main_norm.weight", c.hidden_size)
    expect.floats(f"{last}.norm.weight", c.hidden_size)
    for part in names:
        expect.floats(f"{last}.markov_head.{part}.weight", c.vocab_size, shape.markov_rank)
    expect.floats(f"{last}.confidence_head.proj.weight", 1, c.hidden_size + shape.markov_rank)


def read_around(reader: Reader, shape: DSparkShape, layers: StreamModel, names: MarkovNames) -> DraftStages:
    """The stages whose layers are read: all else."""
    hidden, last = layers.config.hidden_size, f"layers.{len(layers.weights.layers) - 1}"
    return DraftStages(
        shape=shape,
        layers=layers,
        main_proj=reader.dense("layers.0.main_proj", hidden, len(shape.target_layer_ids) * hidden),
        main_norm=reader.small("layers.0.main_norm.weight"),
        markov_embed=reader.plain(f"{last}.markov_head.{names.embed}.weight"),
        # In memory as the recorder wants it, so that it need not copy it.
        markov_head=reader.plain(f"{last}.markov_head.{names.head}.weight").t().contiguous().t(),
        confidence=reader.small(f"{last}.confidence_head.proj.weight"),
    )


def stage_experts(c: StreamConfig, checkpoint: Checkpoint, stages: int, kernels: Kernels) -> ExpertStore:
    """The experts of all stages, in host memory; the checkpoint is of these alone (`stages_of`)."""
    of_experts = sum(entry.nbytes for name, entry in checkpoint.entries.items() if ".ffn.experts." in name)
    tier = Tier("dram", int(of_experts * ALIGNED) + LEAST_BYTES, HOST)
    return ExpertStore(StreamExpertFiles.of(c, checkpoint, stages), kernels, tier)
