"""What of a prompt's chunk is streamed, and who computes how much of it, as store and planner both see it."""

from __future__ import annotations

from collections.abc import Sequence

# Uses of a layer's expert, on average, from which on nearly all of them are used.
MANY_USES = 4
# Slots of a ring at most, and the share of a tier's slots that it may take.
RING_SLOTS = 64
RING_SHARE = 4
# Experts that are computed together: enough for few launches, few enough to start early.
GROUP = 8
# What starting an expert's share of a group's operations on a GPU takes, one by one from Python.
STARTING_S = 32e-6


def is_streamed(tokens: int, top_k: int, experts: int) -> bool:
    """Whether so many tokens use nearly all of a layer's experts."""
    return tokens * top_k >= MANY_USES * experts


def ring_slots(slots: int) -> int:
    """How many slots of a tier a pass borrows."""
    return min(RING_SLOTS, slots // RING_SHARE)


def carrying_s(uses: float, tokens: int, row_bytes: int, rates: Sequence[float]) -> float:
    """Seconds for which a layer's inputs on their way to other GPUs, or outputs on their way back, keep a
    link busy, if GPUs share the experts evenly; rates in bytes a second."""
    if len(rates) < 2:
        return 0.0
    return max(float(tokens), uses * (1 - 1 / len(rates))) * row_bytes / min(rates)


def split(
    costs: Sequence[float],
    sending_s: float,
    starting_s: float = 0.0,
    held: int = 0,
    carrying: float = 0.0,
) -> int:
    """How many of some experts, the cheapest ones first, the processor computes while the others are sent, so
    that both finish together: costs in seconds, `sending_s` for each. `starting_s` for each on GPUs, which
    hold `held` others; links carry other things for `carrying` seconds."""

    def others(count: int) -> float:
        return max(count * sending_s + carrying, (count + held) * starting_s)

    computing = 0.0
    for number, cost in enumerate(costs):
        computing += cost
        if computing > others(len(costs) - number - 1):
            before = max(computing - cost, others(len(costs) - number))
            return number + 1 if computing < before else number
    return len(costs)
