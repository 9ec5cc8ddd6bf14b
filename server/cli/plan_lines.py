"""The plan that a server starts by, in five lines, and the reasons of its choices."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING

from server.cli.terminal import bytes_text

if TYPE_CHECKING:
    from memory.hardware.detect import HugePages
    from memory.planner.cost_model import StepCost
    from memory.planner.placement import Placement
    from server.serving.planned import Planned


def plan_lines(planned: Planned) -> Iterator[str]:
    """The machine, where weights are, what else takes memory, what is expected."""
    plan, machine, work = planned.plan, planned.machine, planned.plan.workload
    gpus = ", ".join(f"{gpu.name} {bytes_text(gpu.memory_bytes)}" for gpu in plan.hardware.gpus)
    free = bytes_text(machine.available_bytes)
    yield f"The plan: {machine.cores} cores, {free} of memory free, {gpus or 'no GPU used'}"
    yield f"  weights: {', '.join(_weights(plan.placement) + _experts(plan.placement))}"
    kv = bytes_text(sum(plan.placement.kv_bytes().values()))
    yield (
        f"  {work.sequences} sequences of up to {work.context:,} tokens in {kv} of KV, chunks of "
        f"{work.prefill_chunk:,}, {bytes_text(work.prefix_bytes)} for prefixes"
    )
    expected = plan.expected
    yield (
        f"  expected: {_rate(expected.alone)} alone, {_rate(expected.together)} for {work.sequences} "
        f"together, prompts {_rate(expected.prefill)}"
    )
    assumed = len(plan.hardware.assumed)
    unknown = f"{assumed} rates are assumed (`loci bench hardware` measures them); " if assumed else ""
    yield f"  {unknown}--explain says why, `loci info --running` what became of it"


def explained(planned: Planned) -> Iterator[str]:
    """Each choice, its flag and its reason."""
    for choice in planned.plan.choices:
        yield f"  --{choice.setting.replace('_', '-')} {choice.value}: {choice.why}"
    yield from _huge_pages(planned.machine.huge_pages)
    for line in planned.plan.hardware.assumed:
        yield f"  assumed: {line}"


def _huge_pages(found: HugePages) -> Iterator[str]:
    """What the system makes of memory for weights, where it tells."""
    if found.mode:
        made = "as the system refuses larger ones" if found.mode == "never" else "and KV in pages of 4 KiB"
        size = "4 KiB" if found.mode == "never" else "2 MiB"
        yield f"  weights in DRAM lie in pages of {size}, {made} ({found.mode})"
    if found.reserved_bytes:
        reserved = bytes_text(found.reserved_bytes)
        yield f"  {reserved} are reserved as huge pages for others: Loci cannot use them"


def _weights(placement: Placement) -> list[str]:
    """Bytes by tier."""
    found = []
    for tier, parts in placement.allocated().items():
        nbytes = sum(nbytes for part, nbytes in parts.items() if part not in ("kv", "prefixes"))
        found += [f"{bytes_text(nbytes)} in {tier}"] if nbytes else []
    return found


def _experts(placement: Placement) -> list[str]:
    """Shares of experts by tier, where they are in several."""
    held: dict[str, int] = defaultdict(int)
    for place in placement.places:
        if place.kind == "routed_experts":
            held["disk" if place.tier == "nvme" else place.tier] += place.count
    total = sum(held.values())
    where = ", ".join(f"{count / total:.0%} in {tier}" for tier, count in held.items())
    return [f"of its experts {where}"] if len(held) > 1 else []


def _rate(cost: StepCost) -> str:
    return f"{cost.tokens_per_s:.3g} tok/s ({cost.bound})"
