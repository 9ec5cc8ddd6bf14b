"""What a server says as it brings a model up, and what it refuses before any weight is read."""

from __future__ import annotations

import logging
import re

import pytest

from server.serving.service import Served, bring_up, prepare
from server.settings import resolve_settings


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
