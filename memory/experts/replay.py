"""Replays a recorded trace through each policy and compares hit rates with the optimum (Belady).

Also evaluates exchanges between a GPU and DRAM, with and without the required margin.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from memory.experts.policy import EXCHANGE_MARGIN, NO_NEIGHBOURS, POLICIES, Predictive, belady_hits, replay
from memory.experts.traces import RoutingTrace


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
    nearby = [trace.neighbours_of(layer) for layer in range(trace.layers)]
    uses = sum(len(step) for layer in steps for step in layer)
    scores = []
    for share in shares:
        slots = max(1, round(share * experts))
        best = sum(belady_hits(layer, slots, experts) for layer in steps)
        for name, policy in POLICIES.items():
            hits = sum(
                replay(layer, slots, policy(experts), neighbours=neighbours).hits
                for layer, neighbours in zip(steps, nearby, strict=True)
            )
            scores.append(PolicyScore(name, share, hits / uses, best / uses))
    return scores


@dataclass(frozen=True)
class ExchangeScore:
    """What a full GPU with slots for a share of a layer's experts does; rates are of all uses."""

    routing: str
    slots_share: float
    margin: float
    hit_rate: float
    exchange_rate: float


def compare_margins(trace: RoutingTrace, experts: int, shares: tuple[float, ...]) -> list[ExchangeScore]:
    """Exchanges without a margin and with the one that serves, on the trace and on uniform routing."""
    recorded = [trace.steps(layer) for layer in range(trace.layers)]
    random = np.random.default_rng(0)
    uniform = [[set(random.permutation(experts)[: len(step)].tolist()) for step in recorded[0]]]
    scores = []
    nearby = [trace.neighbours_of(layer) for layer in range(trace.layers)]
    for name, layers, neighbours in (
        ("recorded", recorded, nearby),
        ("uniform", uniform, [[NO_NEIGHBOURS] * len(uniform[0])]),
    ):
        uses = sum(len(step) for layer in layers for step in layer)
        for share in shares:
            slots = max(1, round(share * experts))
            for margin in (1.0, EXCHANGE_MARGIN):
                replays = [
                    replay(layer, slots, Predictive(experts), margin, of)
                    for layer, of in zip(layers, neighbours, strict=True)
                ]
                hits, exchanges = sum(r.hits for r in replays), sum(r.exchanges for r in replays)
                scores.append(ExchangeScore(name, share, margin, hits / uses, exchanges / uses))
    return scores
