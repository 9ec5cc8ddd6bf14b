"""Where routed experts of V4 and V4.1 are in a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch

from engine.families.streams.config import StreamConfig
from engine.families.streams.stored import StoredFormats
from memory.checkpoint.checkpoint import Checkpoint
from memory.checkpoint.entries import TensorEntry
from memory.experts.reader import APART
from quant.formats.stored import unpack
from quant.kernels.interface import ExpertFormats
from quant.packed import Format, PackedTensor


@dataclass(frozen=True)
class StreamExpertFiles:
    """Where the routed experts of a checkpoint are, for the expert store."""

    checkpoint: Checkpoint
    layers: int
    experts: int
    hidden: int
    width: int
    format: Format
    together = APART

    @classmethod
    def of(cls, c: StreamConfig, checkpoint: Checkpoint, layers: int) -> Self:
        """Those of `layers` layers."""
        return cls(
            checkpoint,
            layers,
            c.n_routed_experts,
            c.hidden_size,
            c.moe_intermediate_size,
            StoredFormats(checkpoint).experts,
        )

    def formats(self, layer: int) -> ExpertFormats:
        """The same in every layer."""
        return self.format, self.format, self.format

    def entries(self, layer: int, expert: int, number: int) -> list[TensorEntry]:
        """The tensors of one matrix of an expert: number 0 is w1, 1 is w3, 2 is w2."""
        name = self._name(layer, expert, number)
        return [self.checkpoint.entries[f"{name}.{part}"] for part in ("weight", "scale")]

    def matrix(self, layer: int, expert: int, number: int, raw: dict[str, torch.Tensor]) -> PackedTensor:
        """The matrix from the raw bytes of its tensors, by name."""
        name = self._name(layer, expert, number)
        is_down = number == 2
        shape = (self.hidden, self.width) if is_down else (self.width, self.hidden)
        scale_dtype = self.checkpoint.entries[f"{name}.scale"].dtype
        return unpack(self.format, shape, raw[f"{name}.weight"], raw[f"{name}.scale"], scale_dtype)

    def _name(self, layer: int, expert: int, number: int) -> str:
        return f"layers.{layer}.ffn.experts.{expert}.{('w1', 'w3', 'w2')[number]}"
