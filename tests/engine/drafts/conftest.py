"""Golden models, each loaded once for the tests of a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from engine.families.loader import Loaded, load
from memory.planner.budget import MemoryBudget
from tests.conftest import golden_path


@pytest.fixture(scope="module")
def model_of() -> Iterator[Callable[[str], Loaded]]:
    loaded: dict[str, Loaded] = {}

    def get(name: str) -> Loaded:
        if name not in loaded:
            loaded[name] = load(golden_path(name), MemoryBudget(dram_bytes=1 << 30))
        return loaded[name]

    yield get
    for each in loaded.values():
        each.model.close()
