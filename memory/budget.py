"""What a model may take of this machine: bytes of DRAM, and cards with their budgets."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from memory.hardware import available_memory_bytes
from memory.profiles import DeviceSpec, parse_bytes, parse_devices
from memory.tiers import Tier
from quant.errors import BudgetError, ConfigError

# Share of the memory that is free at start that weights may take; the rest is for caches and work space.
WEIGHTS_SHARE = 0.75


@dataclass(frozen=True)
class MemoryBudget:
    """Budgets that loading must keep: `dram_bytes` for all weights in host memory, `cards` for experts."""

    dram_bytes: int
    cards: tuple[Tier, ...] = ()

    @classmethod
    def of_this_machine(cls, dram: str | None = None, devices: str | None = None) -> MemoryBudget:
        """Budgets as a person writes them: `dram` like `16GiB`, `devices` like `virtual:24GiB@12.5GB/s`.

        Without `dram` it is a share of the memory that is free now, less what virtual cards take of
        it. Raises ConfigError for text that is not understood, BudgetError where there is not as much.
        """
        cards = tuple(_tier(device) for device in parse_devices(devices)) if devices else ()
        on_cards = sum(card.budget_bytes for card in cards)
        free = available_memory_bytes()
        dram_bytes = int(free * WEIGHTS_SHARE) - on_cards if dram is None else parse_bytes(dram)
        asked = max(dram_bytes, 0) + on_cards
        if dram_bytes <= 0 or asked > free:
            raise BudgetError(
                f"the budgets for DRAM and virtual cards come to {asked / 1e9:.1f} GB, "
                f"{free / 1e9:.1f} GB of memory are free; ask for less"
            )
        return cls(dram_bytes, cards)


def _tier(device: DeviceSpec) -> Tier:
    if device.kind != "virtual":
        raise ConfigError(
            f"devices: computing on {device.kind} devices is not supported yet; virtual cards and DRAM are"
        )
    return Tier(f"vram:{device.index}", device.budget_bytes, torch.device("cpu"), device.link_bytes_per_s)
