"""`loci plan --drafts`: one answer's speed with drafted tokens, where so many of them are right."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from server.cli.terminal import print_table

if TYPE_CHECKING:
    from memory.hardware.profiles import HardwareProfile
    from memory.planner.placement import Workload
    from memory.planner.routing import Routing
    from memory.planner.shape import ModelShape

ACCEPTED = 0.8
# DSpark's block is of five tokens; its three stages draft them together.
MOST_DRAFTED, STAGES = 5, 3
# fastllm's published 27.0 and 41.1 tok/s of V4.1-Flash on two RTX 4090 (README.md), without drafts and with
# five, of which 89 % were right: a step of six tokens, drafting included, took 3 times one of a single token.
PUBLISHED_MODEL, PUBLISHED_GAIN, PUBLISHED_ACCEPTED = "deepseek-v4.1-flash", 41.1 / 27.0, 0.89


def show_drafts(
    shape: ModelShape,
    machine: HardwareProfile,
    workload: Workload,
    recorded: Routing | None,
    *,
    as_json: bool,
) -> None:
    """Print the forecast by drafted tokens, of a model that fits."""
    from memory.planner.drafts import drafted_steps
    from memory.planner.routing import SKEWED, UNIFORM

    routing = recorded or (SKEWED if shape.expert_nbytes else UNIFORM)
    steps = drafted_steps(shape, machine, workload, routing, MOST_DRAFTED, ACCEPTED, STAGES)
    assumed = (
        f"assumed, not measured: a drafted token is right with a chance of {ACCEPTED:.0%} where those before "
        f"it are; drafting takes as long as {STAGES} of the model's {len(shape.layers)} layers; each token "
        f"chooses experts by itself; routing {routing.name} ({routing.source})"
    )
    if as_json:
        found = [
            {
                "drafted": step.drafted,
                "tokens_a_step": step.tokens,
                "step_s": step.step_s,
                "drafting_s": step.drafting_s,
                "tokens_per_s": step.tokens_per_s,
            }
            for step in steps
        ]
        print(json.dumps({"model": shape.name, "hardware": machine.name, "assumed": assumed, "steps": found}))
        return
    print(f"{shape.name} on {machine.name}, one answer\n")
    print_table(
        ["drafted", "tokens a step", "step ms", "drafting ms", "tok/s", "gain"],
        [
            (
                str(step.drafted),
                f"{step.tokens:.2f}",
                f"{1e3 * step.step_s:.1f}",
                f"{1e3 * step.drafting_s:.1f}",
                f"{step.tokens_per_s:.1f}",
                f"{step.tokens_per_s / steps[0].tokens_per_s:.2f}",
            )
            for step in steps
        ],
        right=(0, 1, 2, 3, 4, 5),
    )
    if shape.name == PUBLISHED_MODEL:
        of_six = sum(PUBLISHED_ACCEPTED**n for n in range(MOST_DRAFTED + 1)) / PUBLISHED_GAIN
        gain = steps[MOST_DRAFTED].tokens / of_six
        print(
            f"\nneighbouring tokens share experts: by fastllm's published gain of {PUBLISHED_GAIN:.2f} at "
            f"{PUBLISHED_ACCEPTED:.0%} accepted, a step of six tokens takes {of_six:.1f} times "
            f"one of one; then {MOST_DRAFTED} drafted bring {gain * steps[0].tokens_per_s:.1f} tok/s, a gain "
            f"of {gain:.2f}"
        )
    best = max(steps, key=lambda step: step.tokens_per_s)
    print(f"\nbest: {best.drafted} drafted, {best.tokens_per_s:.1f} tok/s; {assumed}")
