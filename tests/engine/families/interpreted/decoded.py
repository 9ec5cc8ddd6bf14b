"""A model on GPUs whose kernels run in Triton's interpreter, and its golden text decoded there."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.families.base import Batch, KvCache, Model
from engine.families.decoder.cache import DecoderCache
from engine.families.deepseek_v4.forward import V4Cache
from engine.families.deepseek_v41.forward import V41Cache
from engine.families.on_gpus.step import OnGpus
from memory.planner.budget import MemoryBudget
from memory.planner.placement import Workload
from memory.planner.placing import GPU_BASE_BYTES
from memory.tiers import Tier
from quant.formats.kv_names import KvFormat
from quant.kernels.choice import choose
from quant.kernels.devices import DeviceKernels
from tests.interpreted_gpus import InterpretedGpu

SLOTS = 3
TOLERANCE = 1e-4  # other orders of summation
RecordedCache = DecoderCache | V4Cache | V41Cache


def kernels_on(gpus: Sequence[torch.device]) -> DeviceKernels:
    return DeviceKernels(choose(), {gpu: InterpretedGpu(gpu) for gpu in gpus})


def budget_on(
    gpus: Sequence[torch.device], gpu_bytes: int, dram_bytes: int, context: int, kv_format: KvFormat
) -> MemoryBudget:
    """So much of each GPU, beside what a GPU itself takes, for sequences of `context` tokens."""
    room = GPU_BASE_BYTES + gpu_bytes
    tiers = tuple(Tier(f"vram:{i}", room, device, 40e9) for i, device in enumerate(gpus))
    workload = Workload(context=context, sequences=SLOTS, prefill_chunk=64)
    return MemoryBudget(dram_bytes, tiers, workload, kv_format=kv_format)


def decoder_of(cache: KvCache) -> OnGpus:
    """The recorded step of a cache."""
    assert isinstance(cache, RecordedCache)
    assert isinstance(cache.decoder, OnGpus)
    return cache.decoder


class Decoded:
    """A model's golden text in several slots, decoded by programs; and operation by operation too, where the
    golden logits are not what is expected."""

    def __init__(
        self, model: Model, context: int, ids: Sequence[int], logits: torch.Tensor, is_golden: bool = True
    ) -> None:
        self.model = model
        self.replayed = model.new_cache(SLOTS, context)
        decoder_of(self.replayed)
        self.eager: KvCache | None = None
        if not is_golden:
            self.eager = model.new_cache(SLOTS, context)
            assert isinstance(self.eager, RecordedCache)
            self.eager.decoder = None
        self.ids, self.logits = list(ids), logits
        self.held = dict.fromkeys(range(SLOTS), 0)

    def logits_behind(self, counts: dict[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Those behind further tokens of some slots: replayed, and expected."""
        parts = [(slot, at := self.held[slot], self.ids[at : at + n]) for slot, n in counts.items()]
        batch = Batch.of(parts)
        for slot, n in counts.items():
            self.held[slot] += n
        found = self.model.forward(batch, self.replayed)
        if self.eager is None:
            return found, self.logits[[self.held[slot] - 1 for slot in counts]]
        return found, self.model.forward(batch, self.eager)

    def step(self, counts: dict[int, int], *, tolerance: float = TOLERANCE) -> None:
        """Further tokens of some slots: the expected logits, and so, of the golden text, the same choice."""
        found, expected = self.logits_behind(counts)
        assert (found - expected).abs().max() < tolerance
        if self.eager is None:
            assert found.argmax(-1).tolist() == expected.argmax(-1).tolist()

    def step_of_encoded(self, counts: dict[int, int]) -> None:
        """Further tokens where the cache is encoded: a value between two codes may become either one."""
        found, expected = self.logits_behind(counts)
        assert (found - expected).abs().median() < TOLERANCE
        assert (found - expected).abs().max() < 0.05 * expected.abs().max()
