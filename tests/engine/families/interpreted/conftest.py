"""GPUs in name only that take KV in pages as large as a real one's, by plan, and a quicker interpreter."""

from __future__ import annotations

import pytest

from memory.hardware.profiles import CUDA_PAGE
from memory.planner import budget
from tests.interpreter import do_not_check_sums, do_not_repeat


@pytest.fixture(autouse=True)
def pages_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "page_bytes_of", lambda device: CUDA_PAGE)


@pytest.fixture(autouse=True)
def quicker(monkeypatch: pytest.MonkeyPatch) -> None:
    do_not_repeat(monkeypatch)
    do_not_check_sums(monkeypatch)
