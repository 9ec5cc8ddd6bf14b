"""A calculation of costs, put together from what is known and what is assumed; each says where it is from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quant.errors import ConfigError

if TYPE_CHECKING:
    from memory.hardware.profiles import MachineCosts
    from memory.planner.economics import ApiPrice, Case, Costs, Rates, Tokens
    from memory.planner.price_files import Assumptions, PriceList
    from server.cli.money_arguments import CostFiles


@dataclass(frozen=True)
class Report:
    """A case and the prices it is held against; `assumptions` say where everything is from.

    together  rates with several answers at a time, where they are known
    """

    title: str
    case: Case
    prices: PriceList
    chosen: ApiPrice
    assumptions: tuple[str, ...]
    together: Rates | None = None


def report_of(
    title: str,
    rates: Rates,
    rates_source: str,
    tokens: Tokens | None,
    tokens_source: str,
    *,
    files: CostFiles,
    known: MachineCosts | None,
    watts: float | None = None,
    together: Rates | None = None,
) -> Report:
    """Put together what is known and what is assumed. tokens None: as many as the assumed utilisation allows.

    Raises ConfigError for what no calculation can be made of.
    """
    from memory.planner.economics import DAY_S, Case
    from memory.planner.price_files import load_assumptions, load_prices

    price = files.price
    prices, assumed = load_prices(files.prices), load_assumptions(files.costs)
    chosen = _chosen(prices, files.against)
    _check_currencies(prices, assumed, known)
    if price is None and known is None:
        raise ConfigError(
            "what the machine costs is not known: give --price, or [costs] in its profile (docs/economics.md)"
        )
    where = "the shipped costs.toml" if files.costs is None else str(files.costs)
    costs = _costs(assumed, price, known, watts)
    if tokens is None:
        mix = assumed.mix
        tokens = mix.times(assumed.utilisation * DAY_S / rates.busy_s(mix))
        tokens_source = (
            f"assumed ({where}): computing {assumed.utilisation:.0%} of the day, with {mix.cached:g} cached "
            f"and {mix.input:g} new tokens of prompts for one of an answer"
        )
    case = Case(rates, costs, tokens)
    return Report(
        title,
        case,
        prices,
        chosen,
        _assumptions(case, where, rates_source, tokens_source, price, known, watts, prices),
        together,
    )


def _chosen(prices: PriceList, against: str | None) -> ApiPrice:
    if against is None:
        return prices.entries[0]
    for entry in prices.entries:
        if entry.name == against:
            return entry
    names = "; ".join(entry.name for entry in prices.entries)
    raise ConfigError(f"--against {against}: not in the price list, which has: {names}")


def _check_currencies(prices: PriceList, assumed: Assumptions, known: MachineCosts | None) -> None:
    found = {prices.currency: "prices", assumed.currency: "costs"}
    if known is not None:
        found[known.currency] = "the machine's profile"
    if len(found) > 1:
        said = ", ".join(f"{what} in {currency}" for currency, what in found.items())
        raise ConfigError(f"{said}: give all in one currency (docs/economics.md)")


def _costs(
    assumed: Assumptions, price: float | None, known: MachineCosts | None, watts: float | None
) -> Costs:
    from memory.planner.economics import Costs

    idle = known.idle_watts if known is not None else assumed.idle_watts
    busy = known.busy_watts if known is not None else assumed.busy_watts
    if watts is not None:  # on average, with all its waiting: nothing is to be added for computing
        idle = busy = watts
    if price is None:
        assert known is not None
        price = known.price
    return Costs(
        assumed.currency,
        price,
        assumed.resale_share,
        assumed.years,
        assumed.other_per_month,
        assumed.per_kwh,
        idle,
        busy,
    )


def _assumptions(
    case: Case,
    where: str,
    rates_source: str,
    tokens_source: str,
    price: float | None,
    known: MachineCosts | None,
    watts: float | None,
    prices: PriceList,
) -> tuple[str, ...]:
    costs, tokens = case.costs, case.tokens
    of_profile = f"the profile: {known.source}" if known is not None else where
    drawn = f"{costs.idle_watts:.0f} W waiting, {costs.busy_watts:.0f} W computing ({of_profile})"
    if watts is not None:
        drawn = f"{watts:.0f} W on average, measured, waiting and computing alike"
    lines = [
        f"price {costs.price:,.0f} ({'as given' if price is not None else of_profile}); of it "
        f"{costs.resale_share:.0%} is left after {costs.years:g} years, {costs.other_per_month:g} a month "
        f"for other things ({where})",
        f"electricity: {drawn}, at {costs.per_kwh:g} a kWh ({where}), on all day",
        f"speed: {_rate(case.rates.input_per_s)} of prompts, {_rate(case.rates.output_per_s)} of answers: "
        f"{rates_source}",
        f"a day: {tokens.cached:,.0f} tokens of prompts known from before, {tokens.input:,.0f} new ones, "
        f"{tokens.output:,.0f} of answers: {tokens_source}",
        "tokens known from before cost no time here",
        "prices elsewhere stay as listed, and all answers are as useful as each other",
    ]
    doubted = [entry.name for entry in prices.entries if not entry.is_verified]
    if doubted:
        lines.append(f"not verified with the provider, check before deciding: {'; '.join(doubted)}")
    return tuple(lines)


def _rate(per_s: float) -> str:
    return (
        "none"
        if math.isinf(per_s)
        else f"{per_s:,.3g} tokens/s"
        if per_s < 1000
        else f"{per_s:,.0f} tokens/s"
    )
