"""What steps with drafted tokens cost, and what they bring where so many of these are right."""

from __future__ import annotations

from dataclasses import dataclass

from memory.hardware.profiles import HardwareProfile
from memory.planner.cost_model import CostModel
from memory.planner.placement import Workload
from memory.planner.placing import plan
from memory.planner.routing import Routing
from memory.planner.shape import ModelShape


@dataclass(frozen=True)
class DraftedStep:
    """A step of one sequence with `drafted` tokens beside its own.

    tokens   that it is expected to bring: its own, and those drafted ones that are right
    step_s, drafting_s  of the step, and of the drafts before it
    """

    drafted: int
    tokens: float
    step_s: float
    drafting_s: float

    @property
    def tokens_per_s(self) -> float:
        """Of the answer."""
        return self.tokens / (self.step_s + self.drafting_s)


class _DraftCosts(CostModel):
    def seconds(self, tokens: int, held: int) -> float:
        """A step of so many tokens of one sequence, each of which chooses experts of its own."""
        return self._step(tokens, 1, held).total_s


def step_seconds(
    shape: ModelShape, hardware: HardwareProfile, workload: Workload, routing: Routing, most: int
) -> list[float]:
    """Seconds of steps of one sequence with 1 to `most` tokens, while it holds half the workload's context.

    Experts count in the tiers where they lie, each once. Tokens are taken to choose independently, which is
    dearer than what neighbours do.
    """
    model = _DraftCosts(shape, hardware, plan(shape, hardware, workload), routing)
    return [model.seconds(tokens, workload.context // 2) for tokens in range(1, most + 1)]


def drafted_steps(
    shape: ModelShape,
    hardware: HardwareProfile,
    workload: Workload,
    routing: Routing,
    most: int,
    accepted: float,
    drafting_layers: float,
) -> list[DraftedStep]:
    """Steps with no drafted tokens to `most`.

    accepted  the chance of a drafted token to be right where those before it are
    drafting_layers  a draft takes as long as so many of the model's layers
    """
    seconds = step_seconds(shape, hardware, workload, routing, most + 1)
    layer_s = seconds[0] / len(shape.layers)
    return [
        DraftedStep(
            drafted,
            sum(accepted**count for count in range(drafted + 1)),
            seconds[drafted],
            drafting_layers * layer_s if drafted else 0.0,
        )
        for drafted in range(most + 1)
    ]
