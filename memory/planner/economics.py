"""What tokens cost on a machine of one's own, and what the same tokens cost elsewhere.

A machine costs something each day whether it computes or not (it loses value, and idles), and more for
each second in which it computes. What a kind of token costs is its share of those seconds. docs/economics.md
has the formulas; every figure is in the currency of its `Costs`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

DAY_S = 86_400
YEAR_DAYS = 365.25
MONTH_DAYS = YEAR_DAYS / 12
MILLION = 1_000_000
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Tokens:
    """Tokens of a day: of prompts, known from before (`cached`) or computed (`input`), and of answers."""

    cached: float
    input: float
    output: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.cached + self.input + self.output

    def times(self, factor: float) -> Tokens:
        """So many times as many of each kind."""
        return Tokens(factor * self.cached, factor * self.input, factor * self.output)


@dataclass(frozen=True)
class Rates:
    """Tokens a second while the machine computes nothing else. Cached ones take no time."""

    input_per_s: float
    output_per_s: float

    def busy_s(self, tokens: Tokens) -> float:
        """Seconds that a machine computes for these."""
        return tokens.input / self.input_per_s + tokens.output / self.output_per_s


@dataclass(frozen=True)
class Costs:
    """What a machine costs.

    price            to buy;  resale_share  of it that is left after `years`
    other_per_month  repairs, a place, a line
    per_kwh          of electricity;  idle_watts, busy_watts  at the wall
    """

    currency: str
    price: float
    resale_share: float
    years: float
    other_per_month: float
    per_kwh: float
    idle_watts: float
    busy_watts: float

    @property
    def depreciation_per_day(self) -> float:
        """What the machine loses in value."""
        return self.price * (1.0 - self.resale_share) / (self.years * YEAR_DAYS)

    @property
    def idle_per_day(self) -> float:
        """Electricity of a machine that waits, and what else is paid by the month."""
        return 24 * self.idle_watts / 1000 * self.per_kwh + self.other_per_month / MONTH_DAYS

    @property
    def fixed_per_day(self) -> float:
        """What a day costs without a token."""
        return self.depreciation_per_day + self.idle_per_day

    @property
    def per_busy_s(self) -> float:
        """Electricity of a second's computing, beyond that of waiting."""
        return max(0.0, self.busy_watts - self.idle_watts) / 1000 * self.per_kwh / 3600


@dataclass(frozen=True)
class ApiPrice:
    """An entry of a price list: what a million tokens of each kind cost.

    checked   when, as a date;  source  where;  is_verified  False: somebody else's word for it
    """

    name: str
    cached: float
    input: float
    output: float
    checked: str
    source: str
    is_verified: bool

    def of(self, tokens: Tokens) -> float:
        """What these tokens cost."""
        parts = tokens.cached * self.cached + tokens.input * self.input + tokens.output * self.output
        return parts / MILLION

    def times(self, factor: float) -> ApiPrice:
        """All prices times a factor."""
        return replace(
            self, cached=factor * self.cached, input=factor * self.input, output=factor * self.output
        )


@dataclass(frozen=True)
class PerMillion:
    """What a million tokens of a kind cost: electricity of computing them alone, and with their share of all
    that the machine costs."""

    kind: str
    electricity: float
    full: float


@dataclass(frozen=True)
class Comparison:
    """A machine beside an API, for the same tokens.

    api_per_day        all tokens bought
    local_per_day      as many as the machine can do, and the rest bought
    break_even         tokens a day of the same mix from which on the machine is cheaper; None: never
    is_reachable       the machine can compute so many
    payback_months     until its price is saved; None: never
    """

    price: ApiPrice
    api_per_day: float
    local_per_day: float
    break_even: Tokens | None
    is_reachable: bool
    payback_months: float | None


@dataclass(frozen=True)
class Split:
    """A part of the traffic on the machine, the rest bought: what a month costs. `is_possible` is False where
    the machine cannot compute so much."""

    share: float
    per_month: float
    is_possible: bool


@dataclass(frozen=True)
class Case:
    """A machine, what it costs, and what it is asked for each day."""

    rates: Rates
    costs: Costs
    tokens: Tokens

    @property
    def busy_s(self) -> float:
        """Seconds of a day in which it computes."""
        return self.rates.busy_s(self.tokens)

    @property
    def utilisation(self) -> float:
        """Of the day; above 1, the machine cannot do it."""
        return self.busy_s / DAY_S

    @property
    def most_share(self) -> float:
        """Of the tokens, what the machine can compute."""
        return min(1.0, 1.0 / self.utilisation) if self.busy_s else 1.0

    @property
    def capacity(self) -> Tokens:
        """What it could compute in a day, of the same mix."""
        return self.tokens.times(DAY_S / self.busy_s) if self.busy_s else Tokens(0.0, 0.0, 0.0)

    def per_day(self, share: float = 1.0) -> float:
        """What a day costs with a share of the tokens."""
        return self.costs.fixed_per_day + share * self.busy_s * self.costs.per_busy_s

    def per_million(self) -> list[PerMillion]:
        """Of each kind; everything that a day costs is shared out among its seconds of computing."""
        busy_s = self.busy_s * self.most_share
        each_s = self.costs.fixed_per_day / busy_s if busy_s else 0.0
        found = []
        for kind, seconds in (
            ("cached input", 0.0),
            ("input", MILLION / self.rates.input_per_s),
            ("output", MILLION / self.rates.output_per_s),
        ):
            electricity = seconds * self.costs.per_busy_s
            found.append(PerMillion(kind, electricity, electricity + seconds * each_s))
        return found

    def against(self, price: ApiPrice) -> Comparison:
        """The machine beside an API."""
        share, api = self.most_share, price.of(self.tokens)
        local = self.per_day(share) + (1.0 - share) * api
        running = local - self.costs.depreciation_per_day
        saved = (api - running) * MONTH_DAYS
        even = self._break_even(price)
        return Comparison(
            price,
            api,
            local,
            even,
            even is not None and self.rates.busy_s(even) <= DAY_S,
            self.costs.price / saved if saved > 0 else None,
        )

    def _break_even(self, price: ApiPrice) -> Tokens | None:
        """Where as many tokens cost as much here as there; None where each costs more here, whatever their
        number."""
        gained = price.of(self.tokens) - self.busy_s * self.costs.per_busy_s
        return self.tokens.times(self.costs.fixed_per_day / gained) if gained > 0 else None

    def splits(self, price: ApiPrice) -> list[Split]:
        """Shares of the traffic on the machine, and the largest that it can do. With none, nothing is bought
        but tokens."""
        shares = sorted({*SHARES, self.most_share})
        api = price.of(self.tokens)
        return [
            Split(
                share,
                MONTH_DAYS * ((self.per_day(share) if share else 0.0) + (1.0 - share) * api),
                share <= self.most_share,
            )
            for share in shares
        ]


@dataclass(frozen=True)
class Sensitivity:
    """What follows when one assumption is another: cost of a million tokens of output, and of a day, on the
    machine, tokens a day at break-even, and months to pay back."""

    assumption: str
    value: str
    output: float
    per_day: float
    break_even: float | None
    is_reachable: bool
    payback_months: float | None


def sensitivity(case: Case, price: ApiPrice, together: Rates | None = None) -> list[Sensitivity]:
    """One assumption after another, a little lower and a little higher.

    together  rates with several answers at a time, where they are known
    """
    costs = case.costs
    cases: list[tuple[str, str, Case, ApiPrice]] = [("as assumed", "", case, price)]

    def of_costs(name: str, text: str, changed: Costs) -> None:
        cases.append((name, text, replace(case, costs=changed), price))

    for factor in (0.75, 1.25):
        changed = replace(costs, price=factor * costs.price)
        of_costs("price of the machine", f"{changed.price:,.0f}", changed)
    of_costs("left at the end", "nothing", replace(costs, resale_share=0.0))
    for years in (costs.years - 1, costs.years + 1):
        if years > 0:
            of_costs("years of use", f"{years:g}", replace(costs, years=years))
    for factor in (0.5, 1.5):
        changed = replace(costs, per_kwh=factor * costs.per_kwh)
        of_costs("a kWh", f"{changed.per_kwh:.3g}", changed)
    for factor in (0.5, 2.0):
        more = replace(case, tokens=case.tokens.times(factor))
        cases.append(("tokens a day", f"x {factor:g}", more, price))
    for factor in (0.75, 1.25):
        rates = Rates(factor * case.rates.input_per_s, factor * case.rates.output_per_s)
        cases.append(("speed", f"x {factor:g}", replace(case, rates=rates), price))
    if together is not None:
        cases.append(("several answers at a time", "", replace(case, rates=together), price))
    cases += [
        (f"prices of {price.name}", f"x {factor:g}", case, price.times(factor)) for factor in (0.5, 1.5)
    ]
    return [_row(*each) for each in cases]


def _row(name: str, text: str, case: Case, price: ApiPrice) -> Sensitivity:
    found = case.against(price)
    even = found.break_even.total if found.break_even is not None else None
    output = case.per_million()[-1].full
    return Sensitivity(
        name, text, output, found.local_per_day, even, found.is_reachable, found.payback_months
    )
