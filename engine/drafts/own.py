"""Drafts by weights that come with a model: its MTP layer, or its DSpark stages."""

from __future__ import annotations

import logging
import mmap
from dataclasses import dataclass
from typing import Literal

from engine.drafts.base import Drafter
from engine.drafts.dspark import DSpark
from engine.drafts.mtp import Mtp
from engine.families.base import Family, Model
from engine.families.decoder.draft_forward import DraftLayer
from engine.families.decoder.draft_layer import draft_bytes, draft_description
from engine.families.decoder.family import DecoderFamily
from engine.families.decoder.forward import Decoder
from engine.families.decoder.read_weights import read_draft
from engine.families.decoder.shape import kv_shape
from engine.families.deepseek_v4.config import parse_config as parse_v4_config
from engine.families.deepseek_v4.draft_layer import V4DraftLayer, draft_layer_bytes, read_draft_layer
from engine.families.deepseek_v4.draft_stages import read_stages as read_v4_stages
from engine.families.deepseek_v4.family import DeepseekV4Family
from engine.families.deepseek_v4.forward import DeepseekV4
from engine.families.deepseek_v41.config import parse_config
from engine.families.deepseek_v41.draft_stages import read_stages
from engine.families.deepseek_v41.family import DeepseekV41Family
from engine.families.deepseek_v41.forward import DeepseekV41
from engine.families.streams.draft_stages import DraftStages, stage_bytes
from memory.checkpoint.checkpoint import Checkpoint
from memory.planner.placement import Workload
from quant.kernels.interface import Kernels

logger = logging.getLogger("loci.engine")

# Whether weights for drafts are read: never, wherever they fit, or where they are small beside the rest.
Wanted = Literal["off", "mtp", "auto"]
# Of the memory for weights: with more than that for drafts, experts would be missed.
SMALL = 0.1


@dataclass(frozen=True)
class OwnDrafts:
    """Weights that have been read, and what drafts with them; `room` bytes were kept for them."""

    weights: DraftStages | DraftLayer | V4DraftLayer
    room: int

    def drafter(self, slots: int, capacity: int) -> Drafter:
        """One for up to so many sequences of up to `capacity` tokens."""
        if isinstance(self.weights, DraftStages):
            return DSpark(self.weights, slots)
        return Mtp(self.weights, slots, capacity)

    def close(self) -> None:
        """Stop threads and close files."""
        weights = self.weights
        (weights.layers.weights.experts if isinstance(weights, DraftStages) else weights).close()


def own_draft_bytes(family: Family, checkpoint: Checkpoint) -> int:
    """Bytes of a checkpoint's weights for drafts, of a kind that can be computed; 0 where it has none."""
    if isinstance(family, DeepseekV41Family):
        return 0 if parse_config(checkpoint.config).dspark is None else stage_bytes(checkpoint)
    if isinstance(family, DeepseekV4Family):
        has_stages = parse_v4_config(checkpoint).dspark is not None
        return stage_bytes(checkpoint) if has_stages else draft_layer_bytes(checkpoint)
    if isinstance(family, DecoderFamily):
        return draft_bytes(draft_description(family.description(checkpoint), checkpoint), checkpoint)
    return 0


def own_key_bytes(family: Family, checkpoint: Checkpoint, workload: Workload) -> int:
    """Bytes of the keys that a draft layer keeps of all tokens, beside the model's own; 0 for draft layers
    that look at a window alone, whose keys `own_draft_bytes` has room for."""
    if not isinstance(family, DecoderFamily):
        return 0
    description = draft_description(family.description(checkpoint), checkpoint)
    if description is None:
        return 0
    of_layer, sequences = kv_shape(description.layers[0].attention, "float32"), workload.sequences
    tokens = workload.kv_tokens or sequences * workload.context
    pages = of_layer.pool_bytes(tokens, sequences, workload.context, mmap.PAGESIZE)
    return pages + sequences * of_layer.nbytes(0)


def room_for_drafts(wanted: Wanted, family: Family, checkpoint: Checkpoint, dram_bytes: int) -> int:
    """Bytes of DRAM to keep for weights for drafts, of so many for all weights; 0 where none are read."""
    needed = 0 if wanted == "off" else own_draft_bytes(family, checkpoint)
    if wanted == "auto" and needed > SMALL * dram_bytes:
        logger.info(
            "the model's own weights for drafts, %.1f GB, would take more than a tenth of the memory for "
            "weights; they are left out (--drafts mtp reads them)",
            needed / 1e9,
        )
        return 0
    return needed


def read_own_drafts(model: Model, checkpoint: Checkpoint, kernels: Kernels, room: int) -> OwnDrafts | None:
    """The weights for drafts of the checkpoint that `model` was read from; None where it has none, or where
    parts of it lie on GPUs.

    The model captures from then on what they read. Raises CheckpointError listing what is wrong with them.
    """
    if not model.capture():
        logger.info("the model's own weights for drafts are left out: its layers lie on GPUs")
        return None
    if isinstance(model, DeepseekV41):
        return OwnDrafts(read_stages(model, checkpoint, kernels), room)
    if isinstance(model, DeepseekV4):
        if model.config.dspark is not None:
            return OwnDrafts(read_v4_stages(model, checkpoint, kernels), room)
        return OwnDrafts(read_draft_layer(model, checkpoint, kernels), room)
    assert isinstance(model, Decoder)
    description = draft_description(model.description, checkpoint)
    assert description is not None
    weights = read_draft(description, checkpoint, kernels, model.weights)
    return OwnDrafts(DraftLayer(description, model.info, kernels, weights), room)
