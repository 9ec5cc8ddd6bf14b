"""Tiers, and the arenas that hold their slots.

A tier is memory with a budget in bytes: a GPU's memory, host memory, or a virtual GPU (host memory
with the budget and link speed of a real one, so that the same code runs without a GPU). An arena is the
one allocation of a tier for one purpose, cut into equal slots: nothing fragments, and nothing is
allocated while serving.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import dataclass

import torch

from quant.errors import BudgetError

logger = logging.getLogger("loci.memory")

ALIGNMENT = 64  # slots are aligned to cache lines


@dataclass(frozen=True)
class Tier:
    """A memory tier for weights.

    name          `vram:0`, `vram:1`, `dram`
    budget_bytes  what may be allocated there
    device        where its tensors live; a virtual GPU's are in host memory
    link_bytes_per_s  speed at which bytes arrive from DRAM, to which a virtual GPU's copies are held;
                      None: unlimited
    """

    name: str
    budget_bytes: int
    device: torch.device
    link_bytes_per_s: float | None = None

    @property
    def is_virtual(self) -> bool:
        """True for a GPU that is simulated in host memory."""
        return self.name.startswith("vram") and self.device.type == "cpu"


class Arena:
    """Memory of a tier, cut into `slots` equal slots that are taken and given back.

    lendable  so many of them, the last ones, are an allocation of their own that can be lent to the
              computation of a prompt: see `lend`
    """

    def __init__(
        self, tier: Tier, slots: int, slot_bytes: int, *, pinned: bool = False, lendable: int = 0
    ) -> None:
        stride = -(-slot_bytes // ALIGNMENT) * ALIGNMENT
        if slots * stride > tier.budget_bytes:
            raise BudgetError(
                f"{tier.name}: {slots} slots of {stride} bytes exceed its budget of {tier.budget_bytes} bytes"
            )
        self.tier = tier
        self.slots = slots
        self.slot_bytes = slot_bytes
        self.nbytes = slots * stride
        self._stride = stride
        self.kept = slots - lendable
        self._bytes = _allocate(self.kept * stride, tier)
        self._lendable: torch.Tensor | None = _allocate(lendable * stride, tier) if lendable else None
        self._is_locked = pinned and self.kept > 0 and page_lock(self._bytes, tier)
        self._free = list(range(slots - 1, -1, -1))

    def close(self) -> None:
        """Unlock the pages; slots must not be used afterwards."""
        if self._is_locked:
            torch.cuda.cudart().cudaHostUnregister(self._bytes.data_ptr())  # type: ignore[no-untyped-call]
            self._is_locked = False

    @classmethod
    def filling(
        cls, tier: Tier, slot_bytes: int, most: int, *, pinned: bool = False, lent_bytes: int = 0
    ) -> Arena:
        """As many slots as fit in the tier's budget, at most `most`; those that hold `lent_bytes` can be
        lent, but at most half of them."""
        stride = -(-slot_bytes // ALIGNMENT) * ALIGNMENT
        slots = min(most, tier.budget_bytes // stride)
        return cls(tier, slots, slot_bytes, pinned=pinned, lendable=min(-(-lent_bytes // stride), slots // 2))

    @property
    def free(self) -> int:
        """Number of free slots."""
        return len(self._free)

    def take(self) -> int | None:
        """Take a free slot and return its number; None if all are used."""
        return self._free.pop() if self._free else None

    def give_back(self, slot: int) -> None:
        """Free a used slot."""
        self._free.append(slot)

    @property
    def can_lend(self) -> bool:
        """True if there are slots that can be lent and are not."""
        return self._lendable is not None

    def lend(self) -> None:
        """Free the memory of the slots from `kept` on, none of which may be in use; whoever computes next can
        allocate it."""
        self._free = [number for number in self._free if number < self.kept]
        self._lendable = None

    def take_back(self) -> bool:
        """Allocate the slots that were lent; False while something else has their memory."""
        if self._lendable is None and self.kept < self.slots:
            try:
                self._lendable = _allocate((self.slots - self.kept) * self._stride, self.tier)
            except torch.OutOfMemoryError:
                return False
            self._free = [*range(self.slots - 1, self.kept - 1, -1), *self._free]
        return True

    def slot(self, number: int) -> torch.Tensor:
        """The bytes of a slot, uint8 `[slot_bytes]`."""
        memory, start = self._bytes, number * self._stride
        if number >= self.kept:
            assert self._lendable is not None
            memory, start = self._lendable, (number - self.kept) * self._stride
        return memory[start : start + self.slot_bytes]


def _allocate(nbytes: int, tier: Tier) -> torch.Tensor:
    """One allocation of exactly so many bytes."""
    return torch.empty(nbytes, dtype=torch.uint8, device=tier.device)


def page_lock(memory: torch.Tensor, tier: Tier) -> bool:
    """Page-lock host memory for direct copies by GPUs; False, with a warning, if that is not permitted.

    PyTorch's own pinned allocations are rounded up to a power of two, which would exceed the DRAM budget.
    """
    problem = lock_pages(memory)
    if problem:
        logger.warning(
            "%s: %.1f GB cannot be page-locked (%s); transfers to GPUs will be slower. "
            "Raise the limit with `ulimit -l unlimited`",
            tier.name, memory.nbytes / 1e9, problem,
        )  # fmt: skip
    return not problem


def lock_pages(memory: torch.Tensor) -> str:
    """Page-lock host memory; returns CUDA's error message, or nothing."""
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    error = runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)
    if int(error) == 0:
        return ""
    # CUDA keeps the error and torch would raise it at its next kernel launch: raise it here instead.
    with suppress(RuntimeError):
        torch.ones(1, device="cuda")
    return str(runtime.cudaGetErrorString(error))


def unlock_pages(memory: torch.Tensor) -> None:
    """Undo `lock_pages`, before the memory is freed."""
    torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())  # type: ignore[no-untyped-call]
