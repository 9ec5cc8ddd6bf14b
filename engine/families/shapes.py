"""Shapes for the planner, from a checkpoint's config and headers: its own bytes, part by part."""

from __future__ import annotations

from engine.families.registry import family_of
from memory.checkpoint.checkpoint import Checkpoint
from memory.planner.shape import ModelShape


def shape_of(checkpoint: Checkpoint) -> ModelShape:
    """The shape of a checkpoint, from its config and headers.

    Raises ConfigError for a family that cannot be planned yet, and for a config that it cannot run.
    """
    return family_of(checkpoint).shape(checkpoint)
