"""Costs of tokens, against a sheet that was filled in by hand.

price 1461, a quarter of it left after 3 years = 1095.75 days    1.00 a day of value lost
100 W for 24 h at 0.25 a kWh                                     0.60 a day for waiting
30.4375 a month, which is a month's days                         1.00 a day of other things
460 W while it computes: 0.36 kW more, 0.09 an hour              0.000025 a second

a day: 900,000 tokens of input at 1000/s and 45,000 of output at 10/s: 900 + 4500 = 5400 s, 0.135
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memory.planner.economics import ApiPrice, Case, Costs, Rates, Tokens, sensitivity

COSTS = Costs(
    currency="EUR", price=1461.0, resale_share=0.25, years=3.0, other_per_month=30.4375, per_kwh=0.25,
    idle_watts=100.0, busy_watts=460.0,
)  # fmt: skip
CASE = Case(Rates(1000.0, 10.0), COSTS, Tokens(4_000_000, 900_000, 45_000))
# 0.40 + 0.90 + 0.18 a day
CHEAP = ApiPrice("cheap", 0.10, 1.00, 4.00, "2026-11-01", "made up", True)
DEAR = replace(CHEAP.times(5), name="dear")


def test_a_day_costs_what_the_sheet_says() -> None:
    assert COSTS.depreciation_per_day == pytest.approx(1.00)
    assert COSTS.idle_per_day == pytest.approx(1.60)
    assert COSTS.per_busy_s == pytest.approx(0.000025)
    assert CASE.busy_s == pytest.approx(5400)
    assert CASE.utilisation == pytest.approx(0.0625)
    assert CASE.per_day() == pytest.approx(2.735)
    assert CASE.per_day(0.5) == pytest.approx(2.6675)
    assert CASE.capacity == Tokens(64_000_000, 14_400_000, 720_000)


def test_a_million_tokens_cost_their_share_of_a_day() -> None:
    cached, read, written = CASE.per_million()
    assert (cached.electricity, cached.full) == (0.0, 0.0)
    # 1000 s at 0.000025, and at 2.60 / 5400 s besides
    assert read.electricity == pytest.approx(0.025)
    assert read.full == pytest.approx(0.506481, abs=1e-6)
    # 100,000 s
    assert written.electricity == pytest.approx(2.5)
    assert written.full == pytest.approx(50.648148, abs=1e-6)
    assert 0.9 * read.full + 0.045 * written.full == pytest.approx(CASE.per_day())


def test_break_even_and_payback_against_two_apis() -> None:
    cheap, dear = CASE.against(CHEAP), CASE.against(DEAR)
    assert cheap.api_per_day == pytest.approx(1.48)
    assert cheap.local_per_day == pytest.approx(2.735)
    assert cheap.break_even is not None
    # 2.60 / (1.48 - 0.135) days' tokens of 4,945,000
    assert cheap.break_even.total == pytest.approx(9_559_108, abs=1)
    assert cheap.is_reachable
    assert cheap.payback_months is None  # 1.735 a day of running it is more than 1.48
    assert dear.break_even is not None
    assert dear.break_even.total == pytest.approx(1_769_718, abs=1)  # 2.60 / 7.265
    # 1461 / ((7.40 - 1.735) a day x 30.4375)
    assert dear.payback_months == pytest.approx(8.473, abs=1e-3)


def test_where_electricity_alone_costs_more_nothing_is_ever_even() -> None:
    found = CASE.against(CHEAP.times(0.05))  # 0.074 a day, less than 0.135
    assert found.break_even is None
    assert not found.is_reachable
    assert found.payback_months is None


def test_a_break_even_beyond_what_the_machine_can_do_is_told() -> None:
    found = CASE.against(CHEAP.times(0.19))  # 0.2812 a day: 2.60 / 0.1462 days' tokens, more than 16
    assert found.break_even is not None
    assert found.break_even.total == pytest.approx(17.784 * 4_945_000, rel=1e-3)
    assert not found.is_reachable


def test_shares_of_the_traffic_cost_what_the_sheet_says() -> None:
    splits = {split.share: split for split in CASE.splits(DEAR)}
    assert list(splits) == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert splits[0.0].per_month == pytest.approx(225.2375)  # 30.4375 x 7.40, and no machine
    assert splits[0.5].per_month == pytest.approx(193.8109, abs=1e-3)  # 30.4375 x (2.6675 + 3.70)
    assert splits[1.0].per_month == pytest.approx(83.2466, abs=1e-3)
    assert all(split.is_possible for split in splits.values())


def test_what_a_machine_cannot_do_is_bought() -> None:
    busy = replace(CASE, tokens=CASE.tokens.times(20))  # 108,000 s of a day's 86,400
    assert busy.utilisation == pytest.approx(1.25)
    assert busy.most_share == pytest.approx(0.8)
    # 2.60 + 0.8 x 2.70 + 0.2 x 29.60
    assert busy.against(CHEAP).local_per_day == pytest.approx(10.68)
    splits = {round(split.share, 2): split.is_possible for split in busy.splits(CHEAP)}
    assert splits == {0.0: True, 0.25: True, 0.5: True, 0.75: True, 0.8: True, 1.0: False}
    # 2.60 shared out among the 86,400 s that it can
    assert busy.per_million()[-1].full == pytest.approx(2.5 + 100_000 * 2.60 / 86_400)


def test_one_assumption_after_another_is_changed() -> None:
    rows = {(row.assumption, row.value): row for row in sensitivity(CASE, DEAR, Rates(1000.0, 20.0))}
    assert rows["as assumed", ""].output == pytest.approx(50.648148, abs=1e-6)
    assert rows["price of the machine", "1,096"].per_day == pytest.approx(2.735 - 0.25)
    assert rows["left at the end", "nothing"].per_day == pytest.approx(2.735 + 1 / 3)
    assert rows["years of use", "2"].per_day == pytest.approx(2.735 + 0.5)
    assert rows["a kWh", "0.125"].per_day == pytest.approx(2.735 - 0.3 - 0.0675)
    assert rows["tokens a day", "x 2"].per_day == pytest.approx(2.87)
    assert rows["speed", "x 1.25"].per_day == pytest.approx(2.6 + 0.108)
    assert rows["several answers at a time", ""].per_day == pytest.approx(2.6 + 3150 * 0.000025)
    assert rows["prices of dear", "x 0.5"].break_even == pytest.approx(2.6 / 3.565 * 4_945_000)


@given(
    st.floats(0, 1e5), st.floats(0, 1), st.floats(0.5, 10), st.floats(1, 1e4), st.floats(0.1, 1e3),
    st.floats(0.01, 100),
)  # fmt: skip
def test_at_break_even_both_cost_the_same(
    price: float, left: float, years: float, read: float, written: float, factor: float
) -> None:
    costs = replace(COSTS, price=price, resale_share=left, years=years)
    case, api = Case(Rates(read, written), costs, CASE.tokens), CHEAP.times(factor)
    even = case.against(api).break_even
    if even is None:
        assert api.of(case.tokens) <= case.per_day() - costs.fixed_per_day + 1e-9
        return
    at = replace(case, tokens=even)
    assert at.per_day() == pytest.approx(api.of(even), rel=1e-6)
