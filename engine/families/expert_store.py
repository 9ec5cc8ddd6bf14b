"""The store of a model's routed experts, as they are placed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from engine.families.places import HOST, DensePlaces
from memory.checkpoint.checkpoint import Checkpoint
from memory.checkpoint.part import PartOfCheckpoint
from memory.experts.reader import ExpertFiles
from memory.experts.slots import layouts_of
from memory.experts.store import ASSUMED_CPU_BYTES_PER_S, ASSUMED_CPU_FLOPS, ExpertStore
from memory.experts.traces import trace_of_checkpoint
from memory.planner.budget import MemoryBudget
from memory.telemetry import Telemetry
from memory.tiers import Tier
from quant.errors import FormatError
from quant.kernels.interface import Kernels


def expert_store(
    files: ExpertFiles,
    trace: Path | None,
    kernels: Kernels,
    budget: MemoryBudget,
    places: DensePlaces,
    *,
    telemetry: Telemetry | None = None,
) -> ExpertStore:
    """The routed experts of a checkpoint, as placed. Raises CheckpointError where the routing trace beside
    it, in `trace`, is another model's."""
    gpus, in_dram = gpus_left(places, budget), places.slots_bytes["dram"]
    placed = None
    if _have_slots(files, kernels, gpus):
        tiers = [*(gpu.name for gpu in gpus), "dram"]
        placed = list(zip(*(places.experts(tier) for tier in tiers), strict=True))
    else:  # those planned there are in DRAM too, as far as it goes
        in_dram += places.spare
    return ExpertStore(
        files,
        kernels,
        Tier("dram", in_dram, HOST),
        gpus,
        placed=placed,
        telemetry=telemetry,
        hotness=None if trace is None else trace_of_checkpoint(trace, files.layers, files.experts),
        cpu_bytes_per_s=budget.cpu_bytes_per_s or ASSUMED_CPU_BYTES_PER_S,
        lent_bytes=places.lent,
        cpu_flops=budget.cpu_flops or ASSUMED_CPU_FLOPS,
    )


def trace_path(checkpoint: Checkpoint) -> Path | None:
    """Where a checkpoint's routing trace may lie; that of all layers is none of a part's."""
    return None if isinstance(checkpoint, PartOfCheckpoint) else checkpoint.path


def gpus_left(places: DensePlaces, budget: MemoryBudget) -> list[Tier]:
    """The budget's GPUs, each with its slots for experts."""
    return [replace(gpu, budget_bytes=places.slots_bytes[gpu.name]) for gpu in budget.gpus]


def _have_slots(files: ExpertFiles, kernels: Kernels, gpus: list[Tier]) -> bool:
    """Whether GPUs' kernels can compute experts of these formats."""
    try:
        for gpu in gpus:
            layouts_of(files, kernels.on(gpu.device))
    except FormatError:
        return False
    return True
