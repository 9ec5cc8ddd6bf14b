"""Shapes for the planner, from a checkpoint's config and headers: its own bytes, part by part."""

from __future__ import annotations

from engine.families.decoder.family import DecoderFamily
from engine.families.deepseek_v4.family import DeepseekV4Family
from engine.families.deepseek_v41.config import parse_config as parse_v41
from engine.families.deepseek_v41.shape import checkpoint_shape
from engine.families.registry import family_of
from memory.checkpoint.checkpoint import Checkpoint
from memory.planner.shape import ModelShape
from quant.errors import ConfigError


def shape_of(checkpoint: Checkpoint) -> ModelShape:
    """The shape of a checkpoint, from its config and headers.

    Raises ConfigError for a family that cannot be planned yet, and for a config that it cannot run.
    """
    family = family_of(checkpoint)
    if isinstance(family, DecoderFamily | DeepseekV4Family):
        return family.shape(checkpoint)
    if family.name == "deepseek_v41":
        info, _ = family.describe(checkpoint)
        return checkpoint_shape(parse_v41(checkpoint.config), checkpoint, info.name)
    raise ConfigError(f"{checkpoint.path}: checkpoints of the {family.name} family cannot be planned yet")
