"""What tokens cost here and elsewhere: as people read it, as programs do, and as a picture."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from server.cli.plotting import picture
from server.cli.terminal import print_table

if TYPE_CHECKING:
    from memory.planner.economics import Case
    from server.cli.economics_case import Report

NEVER = "never"


def show_report(report: Report, plot: Path | None, *, as_json: bool) -> None:
    """Print a report for people or programs, and draw it where a picture is wanted."""
    if as_json:
        print(json.dumps(report_json(report), indent=1))
    else:
        print_report(report)
    if plot is not None:
        draw_report(report, plot)
        if not as_json:
            print(f"\nwritten to {plot}")


def print_report(report: Report) -> None:
    """For people."""
    from memory.planner.economics import sensitivity

    case, currency = report.case, report.case.costs.currency
    print(
        f"{report.title}: what tokens cost, in {currency}. Calculated from the assumptions below; no quote.\n"
    )
    print_table(
        ["a million tokens here", "electricity of computing", "with all that a day costs"],
        [(each.kind, _money(each.electricity), _money(each.full)) for each in case.per_million()],
        right=(1, 2),
    )
    print(
        f"A day costs {_money(case.per_day(case.most_share))}: {_money(case.costs.depreciation_per_day)} of "
        f"value lost, {_money(case.costs.idle_per_day)} for waiting, the rest for computing {_hours(case)}."
    )
    if case.utilisation > 1:
        print(
            f"It is asked for more than it can do: {case.most_share:.0%} of the tokens; the rest is bought."
        )
    print()
    _print_elsewhere(report)
    print()
    _print_splits(report)
    print(f"\nIf an assumption is another, against {report.chosen.name}:")
    rows = sensitivity(case, report.chosen, report.together)
    print_table(
        ["", "", "a million of output", "a day", "even at tokens a day", "paid back, months"],
        [
            (
                row.assumption,
                row.value,
                _money(row.output),
                _money(row.per_day),
                _even(row.break_even, row.is_reachable),
                _months(row.payback_months),
            )
            for row in rows
        ],
        right=(2, 3, 4, 5),
    )
    print("\nAssumed:\n" + "\n".join(f"  - {line}" for line in report.assumptions))


def _print_elsewhere(report: Report) -> None:
    rows = []
    for price in report.prices.entries:
        found = report.case.against(price)
        even = _even(found.break_even.total if found.break_even else None, found.is_reachable)
        rows.append(
            (
                price.name,
                price.checked + ("" if price.is_verified else ", to be checked"),
                *(f"{amount:g}" for amount in (price.cached, price.input, price.output)),
                _money(found.api_per_day),
                even,
                _months(found.payback_months),
            )
        )
    print_table(
        [
            "elsewhere",
            "as of",
            "cached",
            "input",
            "output",
            "a day",
            "even at tokens a day",
            "paid back, months",
        ],
        rows,
        right=(2, 3, 4, 5, 6, 7),
    )
    most = report.case.capacity
    print(
        f"This machine can do {most.total:,.0f} tokens a day of this mix, {most.output:,.0f} of them answers."
    )


def _print_splits(report: Report) -> None:
    splits = [(price, report.case.splits(price)) for price in report.prices.entries]
    print("A month, with a share of the tokens here and the rest bought:")
    print_table(
        ["elsewhere", *(f"{split.share:.0%} here" for split in splits[0][1])],
        [
            (price.name, *(_money(split.per_month) if split.is_possible else "too much" for split in each))
            for price, each in splits
        ],
        right=tuple(range(1, 1 + len(splits[0][1]))),
    )


def report_json(report: Report) -> dict[str, Any]:
    """For programs, ready for JSON."""
    from memory.planner.economics import sensitivity

    case = report.case
    found: dict[str, Any] = _finite(
        {
            "title": report.title,
            "currency": case.costs.currency,
            "is_quote": False,
            "assumptions": list(report.assumptions),
            "costs": asdict(case.costs),
            "rates": asdict(case.rates),
            "tokens_per_day": asdict(case.tokens),
            "capacity_per_day": asdict(case.capacity),
            "utilisation": case.utilisation,
            "per_day": case.per_day(case.most_share),
            "per_million": [asdict(each) for each in case.per_million()],
            "elsewhere": [asdict(case.against(price)) for price in report.prices.entries],
            "splits": {
                price.name: [asdict(each) for each in case.splits(price)] for price in report.prices.entries
            },
            "against": report.chosen.name,
            "sensitivity": [asdict(each) for each in sensitivity(case, report.chosen, report.together)],
        }
    )
    return found


def _finite(value: Any) -> Any:
    """Without infinities, which JSON has none of."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def draw_report(report: Report, file: Path) -> None:
    """Costs of a month by tokens a day, here and elsewhere; and of a million tokens of output."""
    from memory.planner.economics import MONTH_DAYS

    case, entries = report.case, report.prices.entries
    most = case.capacity.total
    with picture(file, 2, figsize=(11, 4.2), width_ratios=(3, 2)) as (left, right):
        amounts = [most * 10 ** (-3 + 3 * n / 60) for n in range(61)]
        shares = [amount / case.tokens.total for amount in amounts]
        left.plot(amounts, [MONTH_DAYS * case.per_day(s) for s in shares], "k-", lw=2.5, label="this machine")
        for price in entries:
            each = price.of(case.tokens)
            left.plot(amounts, [MONTH_DAYS * each * s for s in shares], label=price.name)
        left.axvline(case.tokens.total, color="0.6", ls=":", label="as assumed")
        left.set_xscale("log")
        left.set_yscale("log")
        left.set_xlabel("tokens a day, as far as the machine can")
        left.set_ylabel(f"{case.costs.currency} a month")
        left.grid(alpha=0.3)
        left.legend(fontsize="x-small")
        output = case.per_million()[-1]
        names = ["here, all costs", "here, electricity", *(price.name for price in entries)]
        values = [output.full, output.electricity, *(price.output for price in entries)]
        bars = right.barh(names, values, color=["k", "0.5", *(f"C{n}" for n in range(len(entries)))])
        right.bar_label(bars, labels=[_money(value) for value in values], padding=3, fontsize="x-small")
        right.set_xscale("log")
        right.margins(x=0.2)
        right.invert_yaxis()
        right.tick_params(axis="y", labelsize="x-small")
        right.set_xlabel(f"{case.costs.currency} for a million tokens of answers")
        left.set_title("Calculated from assumptions, no quote", fontsize="small", loc="left")


def _money(amount: float) -> str:
    return f"{amount:,.2f}" if amount >= 0.1 or amount == 0 else f"{amount:.3g}"


def _even(tokens: float | None, is_reachable: bool) -> str:
    if tokens is None:
        return NEVER
    return f"{tokens:,.0f}" + ("" if is_reachable else ", more than it can do")


def _months(number: float | None) -> str:
    return NEVER if number is None else f"{number:,.0f}" if number >= 10 else f"{number:.1f}"


def _hours(case: Case) -> str:
    return f"{24 * min(1.0, case.utilisation):.1f} hours"
