"""A small model that is loaded beside the large one, to draft for it (`--draft-model`)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from engine.drafts.small_model import LONGEST, SmallModel
from engine.families.base import Model
from engine.families.loader import OpenedModel, open_model
from memory.planner.budget import MemoryBudget
from memory.planner.placement import Workload
from memory.planner.serving import memory_bytes
from quant.errors import ConfigError

# Sequences that it drafts for at once, and how long they may be: its keys and values are counted in full.
SLOTS, CONTEXT = 4, 8192
# What its weights take beyond the file's bytes, and a step's buffers.
ALIGNED, LEAST_BYTES = 1.05, 32_000_000


@dataclass(frozen=True)
class SmallModelFiles:
    """A small model whose weights are not read yet.

    capacity  tokens of a sequence that it drafts for
    """

    opened: OpenedModel
    capacity: int

    @property
    def weight_bytes(self) -> int:
        """Bytes of DRAM for its weights."""
        shape = self.opened.family.loaded_shape(self.opened.checkpoint, "float32")
        return int(ALIGNED * memory_bytes(shape)) + LEAST_BYTES

    @property
    def nbytes(self) -> int:
        """Bytes of DRAM for it: weights, keys and values."""
        shape = self.opened.family.loaded_shape(self.opened.checkpoint, "float32")
        return self.weight_bytes + shape.kv_bytes(self.capacity, SLOTS)

    def load(self, vocab_size: int) -> LoadedSmallModel:
        """Read its weights, all into DRAM. Raises ConfigError for a model that cannot take tokens back."""
        workload = Workload(self.capacity, SLOTS)
        model = self.opened.load(MemoryBudget(self.weight_bytes, workload=workload)).model
        if model.new_cache(1, LONGEST + 1).margin < LONGEST:
            model.close()
            raise ConfigError(
                f"--draft-model: the states of {model.info.name} cannot be taken back to where they were, "
                "which drafts need; use another model"
            )
        return LoadedSmallModel(model, self.capacity, vocab_size, self.nbytes)


@dataclass(frozen=True)
class LoadedSmallModel:
    """A small model, read; `room` bytes were kept for it. vocab_size is the large one's."""

    model: Model
    capacity: int
    vocab_size: int
    room: int

    def drafter(self) -> SmallModel:
        """What drafts with it."""
        return SmallModel(self.model, SLOTS, self.capacity, self.vocab_size)


def open_beside(path: Path, large: OpenedModel, context: int | None) -> SmallModelFiles:
    """The checkpoint at `path` as a drafter for `large`, whose sequences have up to `context` tokens.

    Raises ConfigError if it is not there, or has other tokens.
    """
    opened = open_model(path)
    if opened.tokenizer.backend.get_vocab() != large.tokenizer.backend.get_vocab():
        raise ConfigError(
            f"--draft-model: {opened.info.name} has other tokens than {large.info.name}; use a small model "
            "of the same tokenizer"
        )
    longest = min(context or CONTEXT, CONTEXT, opened.info.max_context)
    return SmallModelFiles(opened, longest)
