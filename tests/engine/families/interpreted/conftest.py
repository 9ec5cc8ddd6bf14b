"""GPUs in name only that take KV in pages as large as a real one's, by plan."""

from __future__ import annotations

import pytest

from memory.hardware.profiles import CUDA_PAGE
from memory.planner import budget


@pytest.fixture(autouse=True)
def pages_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "page_bytes_of", lambda device: CUDA_PAGE)
