"""What a step with drafted tokens probably costs on this machine, until it is measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from engine.drafts.base import MOST_ROWS
from memory.hardware.profiles import HardwareProfile
from memory.planner.drafts import step_seconds
from memory.planner.placement import Workload
from memory.planner.serving import TYPICAL_PROMPT, routing_of
from memory.planner.shape import ModelShape


def draft_costs(shape: ModelShape, hardware: HardwareProfile, workload: Workload) -> Callable[[int], float]:
    """Of steps of so many tokens, in relation to one of one token, as planned: experts that drafts add count
    in the tier where they would lie."""
    asked = replace(workload, context=min(workload.context, TYPICAL_PROMPT))
    seconds = step_seconds(shape, hardware, asked, routing_of(shape), MOST_ROWS)
    return lambda tokens: seconds[max(tokens, 1) - 1] / seconds[0]
