"""Where the routed experts of a decoder lie in its checkpoint, for the expert store."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.families.decoder.description import Description, Experts
from engine.families.decoder.names import REENCODED
from engine.families.decoder.stored import StoredMatrices
from memory.checkpoint.checkpoint import Checkpoint
from memory.checkpoint.entries import TensorEntry
from memory.experts.reader import APART
from quant.formats.stored_matrix import every_other_row
from quant.kernels.interface import ExpertFormats
from quant.packed import Format, PackedTensor

GATE, UP, DOWN = range(3)  # numbers of an expert's matrices, as the store counts them
ROLES = ("expert_gate", "expert_up", "expert_down")


@dataclass(frozen=True)
class DecoderExpertFiles:
    """`ExpertFiles`: the store counts the layers that have experts, the checkpoint all layers."""

    description: Description
    stored: StoredMatrices

    @classmethod
    def of(cls, description: Description, checkpoint: Checkpoint) -> DecoderExpertFiles:
        """The experts of a verified checkpoint."""
        return cls(description, StoredMatrices(checkpoint))

    @property
    def layers(self) -> int:
        return len(self.description.expert_layers)

    @property
    def experts(self) -> int:
        return self._experts.router.experts

    @property
    def hidden(self) -> int:
        return self.description.hidden

    @property
    def width(self) -> int:
        return self._experts.width

    def formats(self, layer: int) -> ExpertFormats:
        """Those of gate, up and down: of the layer's first expert, where each has tensors of its own."""
        gate, up, down = (self._format(layer, number) for number in (GATE, UP, DOWN))
        return gate, up, down

    @property
    def together(self) -> tuple[tuple[int, ...], ...]:
        return APART if self._is_each or self._experts.layout != "interleaved" else ((GATE, UP), (DOWN,))

    def entries(self, layer: int, expert: int, number: int) -> list[TensorEntry]:
        """The tensors of one matrix of an expert, or the parts of larger ones that hold it."""
        name, width = self._name(layer, expert, number), self.width
        if self._is_each:
            return self.stored.parts(name, self._shape(number))
        layout = self._experts.layout
        if layout == "stacked" or number == DOWN:
            return self.stored.stack_parts(name, expert, 0, self._shape(number)[0])
        if layout == "interleaved":
            return self.stored.stack_parts(name, expert, 0, 2 * width)
        start = width if number == UP else 0
        return self.stored.stack_parts(name, expert, start, start + width)

    def matrix(self, layer: int, expert: int, number: int, raw: dict[str, torch.Tensor]) -> PackedTensor:
        """The matrix from the raw bytes of its tensors, by name."""
        rows, cols = self._shape(number)
        if self._is_each:
            return self.stored.from_parts(self._name(layer, expert, number), (rows, cols), raw)
        parts = [(entry, raw[entry.name]) for entry in self.entries(layer, expert, number)]
        if self._experts.layout == "interleaved" and number != DOWN:
            both = self.stored.from_stack_parts((2 * rows, cols), parts)
            return every_other_row(both, 0 if number == GATE else 1)
        return self.stored.from_stack_parts((rows, cols), parts)

    def _format(self, layer: int, number: int) -> Format:
        name, shape = self._name(layer, 0, number), self._shape(number)
        return self.stored.format_of(name, shape if self._is_each else (self.experts, *shape))

    @property
    def _is_each(self) -> bool:
        return self.description.is_reencoded or self._experts.layout == "each"

    @property
    def _experts(self) -> Experts:
        experts = self.description.experts
        assert experts is not None
        return experts

    def _shape(self, number: int) -> tuple[int, int]:
        return (self.hidden, self.width) if number == DOWN else (self.width, self.hidden)

    def _name(self, layer: int, expert: int, number: int) -> str:
        names = self.description.names
        if self.description.is_reencoded:
            name = REENCODED[ROLES[number]]
        elif self._experts.layout in ("each", "stacked"):
            name = names[ROLES[number]]
        else:
            name = names["experts_down" if number == DOWN else "experts_up"]
        return name.format(layer=self.description.expert_layers[layer], expert=expert)
