"""Price lists and assumptions: what comes with Loci, and files of one's own."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import pytest

from memory.planner.price_files import load_assumptions, load_prices, shipped_text
from quant.errors import ConfigError


def test_shipped_prices_are_dated_sourced_and_marked_as_not_verified() -> None:
    prices = load_prices(None)
    assert prices.currency == "USD"
    assert len({entry.name for entry in prices.entries}) == len(prices.entries) >= 3
    for entry in prices.entries:
        assert date.fromisoformat(entry.checked) <= date(2026, 11, 29)
        assert entry.source
        assert not entry.is_verified  # nobody has asked the providers
        assert entry.cached <= entry.input <= entry.output


def test_the_shipped_files_are_beginnings_of_ones_own(tmp_path: Path) -> None:
    for name in ("prices.toml", "costs.toml"):
        (tmp_path / name).write_text(shipped_text(name))
    assert load_prices(tmp_path / "prices.toml") == load_prices(None)
    assert load_assumptions(tmp_path / "costs.toml") == load_assumptions(None)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("output = 0.60", "output = -0.60", "api.0.output: Input should be greater than or equal to 0"),
        ("output = 0.60", "outputs = 0.60", "api.0.output: missing; api.0.outputs: no such key"),
        ("checked = 2026-10-27", 'checked = "today"', "api.0.checked: Input should be a valid date"),
        ('currency = "USD"', 'currency = "dollars"', "currency: String should match pattern"),
        ('currency = "USD"', "currency = USD", "not TOML"),
        ("flash, peak", "flash, off-peak", "two prices are called 'deepseek-flash, off-peak'"),
    ],
)
def test_a_wrong_price_list_is_refused_in_one_line(tmp_path: Path, old: str, new: str, says: str) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(shipped_text("prices.toml").replace(old, new, 1))
    with pytest.raises(ConfigError) as refused:
        load_prices(file)
    assert str(refused.value).startswith(f"{file}: ")
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_missing_file_says_where_one_is_shown(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none.toml: cannot be read .*docs/economics.md shows such a file"):
        load_assumptions(tmp_path / "none.toml")
