"""The store of a model's routed experts, in what dense weights leave of the budget."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from engine.families.places import HOST, DensePlaces
from memory.experts.reader import ExpertFiles
from memory.experts.store import ASSUMED_CPU_BYTES_PER_S, ASSUMED_CPU_FLOPS, ExpertStore
from memory.experts.traces import trace_of_checkpoint
from memory.planner.budget import MemoryBudget
from memory.telemetry import Telemetry
from memory.tiers import Tier
from quant.kernels.interface import Kernels


def expert_store(
    files: ExpertFiles,
    path: Path,
    kernels: Kernels,
    budget: MemoryBudget,
    places: DensePlaces,
    *,
    kept_free: int = 0,
    telemetry: Telemetry | None = None,
) -> ExpertStore:
    """The routed experts of the checkpoint at `path`, in what is left of each GPU, and of DRAM but for
    `kept_free` bytes. Raises CheckpointError where the routing trace beside it is another model's."""
    return ExpertStore(
        files,
        kernels,
        Tier("dram", places.left["dram"] - kept_free, HOST),
        gpus_left(places, budget),
        telemetry=telemetry,
        hotness=trace_of_checkpoint(path, files.layers, files.experts),
        cpu_bytes_per_s=budget.cpu_bytes_per_s or ASSUMED_CPU_BYTES_PER_S,
        lent_bytes=places.lent,
        cpu_flops=budget.cpu_flops or ASSUMED_CPU_FLOPS,
    )


def gpus_left(places: DensePlaces, budget: MemoryBudget) -> list[Tier]:
    """The budget's GPUs, each with what dense weights leave of it."""
    return [replace(gpu, budget_bytes=places.left[gpu.name]) for gpu in budget.gpus]
