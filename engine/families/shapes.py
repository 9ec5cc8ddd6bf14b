"""Shapes for the planner, from a checkpoint's config and headers: its own bytes, part by part."""

from __future__ import annotations

from engine.families.registry import family_of
from memory.checkpoint.checkpoint import Checkpoint
from memory.planner.shape import ModelShape
from quant.formats.kv_names import KvChoice


def shape_of(checkpoint: Checkpoint, kv_format: KvChoice = "float32") -> ModelShape:
    """The shape of a checkpoint, from its config and headers, with KV in this format.

    Raises ConfigError for a family that cannot be planned yet, and for a config that it cannot run.
    """
    family = family_of(checkpoint)
    return family.shape(checkpoint, family.kv_format(checkpoint, kv_format))


def loaded_shape_of(checkpoint: Checkpoint, kv_format: KvChoice = "float32") -> ModelShape:
    """The same with the bytes that the checkpoint takes in memory: a plan of it is what loading allocates."""
    family = family_of(checkpoint)
    return family.loaded_shape(checkpoint, family.kv_format(checkpoint, kv_format))
