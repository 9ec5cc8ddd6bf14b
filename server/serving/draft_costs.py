"""What a step with drafted tokens probably costs on this machine, until it is measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from engine.drafts.drafting import MOST_ROWS
from engine.families.loader import OpenedModel
from memory.planner.budget import MemoryBudget
from memory.planner.drafts import step_seconds
from memory.planner.placement import Workload
from memory.planner.routing import SKEWED, UNIFORM
from quant.errors import ConfigError
from server.serving.chunk import TYPICAL_PROMPT, machine_here


def draft_costs(
    opened: OpenedModel, budget: MemoryBudget, workload: Workload, devices: str | None
) -> Callable[[int], float] | None:
    """Of steps of so many tokens, in relation to one of one token, as planned: experts that drafts add count
    in the tier where they would lie. None for what cannot be planned."""
    try:
        shape = opened.family.shape(opened.checkpoint, budget.kv_format)
    except ConfigError:
        return None
    asked = replace(workload, context=min(workload.context, TYPICAL_PROMPT))
    routing = SKEWED if shape.expert_nbytes else UNIFORM
    seconds = step_seconds(shape, machine_here(shape, budget, devices), asked, routing, MOST_ROWS)
    return lambda tokens: seconds[max(tokens, 1) - 1] / seconds[0]
