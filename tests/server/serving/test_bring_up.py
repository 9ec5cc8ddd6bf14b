"""What a server says as it brings a model up, and what it refuses before any weight is read."""

from __future__ import annotations

import logging
import re

import pytest

from quant.errors import ConfigError
from server.serving import planned
from server.serving.service import Served, bring_up, prepare
from server.settings import resolve_settings

FILE = __file__  # which is no directory


@pytest.fixture(autouse=True)
def _no_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planned, "known_rates", lambda *_: {})


def brought_up(**settings: str) -> Served:
    """The demonstration model, whose engine has ended again."""
    served = bring_up(prepare(resolve_settings({"model": "demo", "devices": "none", **settings})))
    served.engine_here.stop()
    served.loaded.model.close()
    return served


def test_the_log_names_the_pool_that_would_hold_what_the_model_can(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "loci"):
        served = brought_up(kv_budget="700KiB")
    most = served.loaded.model.info.max_context
    assert served.engine.max_context < most
    (named,) = re.findall(rf"--kv-budget (\w+) would hold the {most:,} that the model can", caplog.text)
    assert brought_up(kv_budget=named).engine.max_context == most


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"aside_disk": "20 gigs"}, "'20 gigs' is not a size"),
        ({"prefix_disk": "nonsense"}, "'nonsense' is not a size"),
        ({"prefix_disk": "1GiB", "prefix_cache": "0"}, "raise --prefix-cache"),
        ({"aside_disk": "1GiB", "prefix_dir": FILE}, "no sequences can be put aside there"),
        ({"prefix_disk": "1GiB", "prefix_dir": FILE}, "no states can be kept there"),
    ],
)
def test_disk_that_cannot_be_used_is_refused_before_weights_are_read(
    settings: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare(resolve_settings({"model": "demo", "devices": "none", **settings}))
