"""What each policy would have hit on a recorded trace, against the most that any could (Belady)."""

from __future__ import annotations

from dataclasses import dataclass

from memory.expert_policy import POLICIES, belady_hits, policy_hits
from memory.routing_trace import RoutingTrace


@dataclass(frozen=True)
class PolicyScore:
    """Hits of one policy with slots for a share of a layer's experts; rates are of all uses."""

    policy: str
    slots_share: float
    hit_rate: float
    belady_rate: float

    @property
    def of_belady(self) -> float:
        """Hits as a part of Belady's."""
        return self.hit_rate / self.belady_rate if self.belady_rate else 1.0


def compare_policies(trace: RoutingTrace, experts: int, shares: tuple[float, ...]) -> list[PolicyScore]:
    """Every policy at every share of slots, over all layers of the trace."""
    steps = [trace.steps(layer) for layer in range(trace.layers)]
    uses = sum(len(step) for layer in steps for step in layer)
    scores = []
    for share in shares:
        slots = max(1, round(share * experts))
        best = sum(belady_hits(layer, slots, experts) for layer in steps)
        for name, policy in POLICIES.items():
            hits = sum(policy_hits(layer, slots, policy(experts)) for layer in steps)
            scores.append(PolicyScore(name, share, hits / uses, best / uses))
    return scores
