"""What a model may take of this machine: bytes of DRAM, and cards with their budgets."""

from __future__ import annotations

from dataclasses import dataclass

from memory.hardware import available_memory_bytes
from memory.tiers import Tier

# Share of the memory that is free at start that weights may take; the rest is for caches and work space.
WEIGHTS_SHARE = 0.75


@dataclass(frozen=True)
class MemoryBudget:
    """Budgets that loading must keep: `dram_bytes` for all weights in host memory, `cards` for experts."""

    dram_bytes: int
    cards: tuple[Tier, ...] = ()

    @classmethod
    def of_this_machine(cls) -> MemoryBudget:
        """A share of the memory that is free now, and no cards."""
        return cls(int(available_memory_bytes() * WEIGHTS_SHARE))
