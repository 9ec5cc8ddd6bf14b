"""`loci plan --budget`: which machine of listed parts to buy for a model, and its plan."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from memory.user_files import check_writable, whole_file
from quant.errors import ConfigError
from server.cli.plan_report import plan_report, print_plan, workload_of
from server.cli.progress import progress
from server.cli.terminal import print_table

if TYPE_CHECKING:
    from memory.planner.advice import Advice
    from memory.planner.parts import Parts
    from memory.planner.routing import Routing
    from memory.planner.shape import ModelShape

MORE = 500.0  # what this much more would bring is said too
Goal = Literal["alone", "together"]


@dataclass(frozen=True)
class Purchase:
    """What may be bought, for what: an answer alone or several together."""

    budget: float
    parts: Path | None
    owned: Sequence[str]
    goal: Goal
    save: Path | None


def show_purchase(
    shape: ModelShape,
    context: int | None,
    batch: int,
    recorded: Routing | None,
    purchase: Purchase,
    *,
    as_json: bool,
) -> bool:
    """Print the best machine for the money, runners-up, what more money would bring, and the plan; whether
    any machine can hold the model. Raises ConfigError for lists of parts that are wrong."""
    from memory.planner.advice import Adviser
    from memory.planner.parts import load_parts
    from memory.planner.placement import Workload
    from memory.planner.routing import SKEWED, UNIFORM
    from server.cli.plan_report import DEFAULT_CONTEXT

    parts = load_parts(purchase.parts).owning(_counts(purchase.owned))
    if purchase.save is not None:
        check_writable(purchase.save)
    routing = recorded or (SKEWED if shape.expert_nbytes else UNIFORM)
    workload = Workload(context or min(DEFAULT_CONTEXT, shape.max_context), batch)
    adviser = Adviser(shape, parts, workload, routing, purchase.goal == "together")
    with progress("machines") as on_progress:
        found = adviser.best(purchase.budget, on_progress)
    with progress("machines") as on_progress:
        more = adviser.best(purchase.budget + MORE, on_progress)
    source = "the shipped example of parts" if purchase.parts is None else str(purchase.parts)
    if not found:
        _say_nothing_fits(shape, purchase, parts, source, more, as_json=as_json)
        return False
    profile = found[0].machine.profile("these parts", parts.currency)
    planned = workload_of(shape, profile, context, batch, None)
    if purchase.save is not None:
        _save(found[0], shape, parts, purchase.save)
    if as_json:
        from memory.planner.placing import plan

        report = {
            "currency": parts.currency,
            "budget": purchase.budget,
            "parts": source,
            "routing": routing.name,
            "machines": [_advice_json(each) for each in found],
            "with_more": {"budget": purchase.budget + MORE, "machine": _advice_json(more[0])},
            "plan": plan_report(shape, profile, plan(shape, profile, planned), recorded),
        }
        print(json.dumps(report, indent=1))
    else:
        print(
            f"{shape.name} for at most {purchase.budget:,.0f} {parts.currency}, of {source}. Speeds are "
            f"forecasts for {routing.name} routing, prices those of the list: no offers.\n"
        )
        _print_best(found[0], parts.currency)
        _print_others(found, more[0], purchase)
        print()
        print_plan(shape, profile, planned, recorded=recorded)
        _print_doubts(found[0], source)
    if purchase.save is not None and not as_json:
        print(f"\nwritten to {purchase.save}: loci plan {shape.name} --hardware {purchase.save} --economics")
    return True


def _counts(owned: Sequence[str]) -> dict[str, int]:
    """`RTX 4090=2` as a name and a number. Raises ConfigError."""
    found = {}
    for text in owned:
        name, equals, count = text.rpartition("=")
        if not equals or not count.isdecimal() or not name.strip():
            raise ConfigError(f"--own {text}: expected a part and how many, such as --own 'RTX 4090=2'")
        found[name.strip()] = int(count)
    return found


def _print_best(best: Advice, currency: str) -> None:
    print(
        f"Buy for {best.price:,.0f} {currency}: {best.alone:.1f} tokens/s for one answer, "
        f"{best.together:.1f} for all together\n"
    )
    rows = []
    for part, count in best.machine.counted():
        owned = min(count, part.owned)
        rows.append(
            (
                f"{count} x {part.name}" + (f", {owned} of them yours" if owned else ""),
                f"{part.cost(count):,.0f}",
                part.checked + ("" if part.is_verified else ", to be checked"),
                part.source,
            )
        )
    print_table(["part", currency, "as of", "source"], rows, right=(1,))


def _print_others(found: Sequence[Advice], more: Advice, purchase: Purchase) -> None:
    rows = [(_named(number), each) for number, each in enumerate(found)]
    if more.machine != found[0].machine:
        rows.append((f"with {MORE:,.0f} more", more))
    print()
    print_table(
        ["", "tok/s alone", "together", "price", "machine"],
        [
            (
                name,
                f"{each.alone:.1f}",
                f"{each.together:.1f}",
                f"{each.price:,.0f}",
                each.machine.description,
            )
            for name, each in rows
        ],
        right=(1, 2, 3),
    )
    if more.machine == found[0].machine:
        print(f"{MORE:,.0f} more would bring nothing.")


def _named(number: int) -> str:
    return "best" if number == 0 else f"runner-up {number}"


def _print_doubts(best: Advice, source: str) -> None:
    doubted = [
        part.name for part, count in best.machine.counted() if not part.is_verified and part.cost(count)
    ]
    if doubted:
        print(f"\nNot verified with a shop ({source}), check before buying: {'; '.join(doubted)}")


def _say_nothing_fits(
    shape: ModelShape, purchase: Purchase, parts: Parts, source: str, more: Sequence[Advice], *, as_json: bool
) -> None:
    if as_json:
        print(json.dumps({"currency": parts.currency, "budget": purchase.budget, "machines": []}, indent=1))
        return
    text = f"no machine of {source} for {purchase.budget:,.0f} {parts.currency} can hold {shape.name}"
    if more:
        text += f"; for {more[0].price:,.0f} one can: {more[0].machine.description}"
    print(text)


def _advice_json(advice: Advice) -> dict[str, Any]:
    return {
        "price": advice.price,
        "decode_alone": advice.alone,
        "decode_together": advice.together,
        "parts": [
            {
                "name": part.name,
                "count": count,
                "cost": part.cost(count),
                "checked": part.checked,
                "source": part.source,
                "is_verified": part.is_verified,
            }
            for part, count in advice.machine.counted()
        ],
    }


def _save(best: Advice, shape: ModelShape, parts: Parts, file: Path) -> None:
    """The machine as a hardware profile."""
    from memory.hardware.profile_text import profile_toml

    profile = best.machine.profile(file.stem, parts.currency)
    note = (
        f"# Built of a list of parts for {shape.name}; rates are forecasts from data sheets, not measured.\n"
    )
    with whole_file(file) as temporary:
        temporary.write_text(note + profile_toml(profile), encoding="utf-8")
