"""A quicker interpreter, which still checks that integers have room."""

from __future__ import annotations

import pytest

from tests.interpreter import do_not_repeat


@pytest.fixture(autouse=True)
def quicker(monkeypatch: pytest.MonkeyPatch) -> None:
    do_not_repeat(monkeypatch)
