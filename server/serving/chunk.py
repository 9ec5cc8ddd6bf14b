"""How many tokens of a prompt a step computes at most, where nobody said it."""

from __future__ import annotations

from dataclasses import replace

from engine.families.loader import OpenedModel
from memory.hardware.profiles import HardwareProfile, parse_devices
from memory.hardware.this_machine import this_machine
from memory.planner.budget import MemoryBudget
from memory.planner.placement import PROCESS_BYTES, Workload
from memory.planner.prefill import SMALLEST_CHUNK, planned_chunk
from memory.planner.shape import ModelShape
from quant.errors import ConfigError

# Of a prompt: longer ones are no reason for larger chunks.
TYPICAL_PROMPT = 32_768


def chunk_here(opened: OpenedModel, budget: MemoryBudget, workload: Workload, devices: str | None) -> int:
    """What the planner takes on this machine, within the budgets; the smallest for what it cannot plan."""
    try:
        shape = opened.family.shape(opened.checkpoint, budget.kv_format)
    except ConfigError:
        return SMALLEST_CHUNK
    asked = replace(workload, context=min(workload.context, TYPICAL_PROMPT))
    return planned_chunk(shape, machine_here(shape, budget, devices), asked)


def machine_here(shape: ModelShape, budget: MemoryBudget, devices: str | None) -> HardwareProfile:
    """This machine for plans of a checkpoint that is on it, within the budgets."""
    machine = this_machine().with_devices(parse_devices(devices) if devices else ())
    return replace(
        machine,
        dram_bytes=budget.dram_bytes + PROCESS_BYTES,  # the budget is for weights alone
        disk_bytes=machine.disk_bytes + shape.nbytes,  # it lies there already
    )
