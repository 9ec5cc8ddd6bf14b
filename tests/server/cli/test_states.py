"""`loci cache`: what servers have written to disk, listed and removed."""

from __future__ import annotations

import json
from pathlib import Path

from engine.cache.stored_states import StatesOnDisk, StoredStates
from engine.families.base import Batch
from engine.families.loader import load
from memory.planner.budget import MemoryBudget
from tests.conftest import golden_path
from tests.server.harness import invoke


def fill(folder: Path) -> None:
    model = load(golden_path("v41-a"), MemoryBudget(1 << 30)).model
    cache = model.new_cache(1, 64)
    stored = StoredStates(cache, StatesOnDisk(folder, 1 << 30, "weights", "tiny-v41"), 1 << 30)
    ids = list(range(2, 40))
    model.forward(Batch.of([(0, 0, ids)]), cache)
    stored.save(0, ids, "", None)
    stored.close()
    model.close()


def test_states_are_listed_and_removed(tmp_path: Path) -> None:
    folder = tmp_path / "states"
    at = ("--prefix-dir", str(folder))
    assert "No states are in" in invoke("cache", *at).stdout
    fill(folder)
    listed = invoke("cache", *at).stdout
    assert "tiny-v41" in listed
    (of,) = json.loads(invoke("cache", *at, "--json").stdout)
    assert (of["model"], of["states"]) == ("tiny-v41", 1)
    refused = invoke("cache", *at, "--clear")
    assert refused.returncode == 1
    assert "pass --yes" in refused.stderr
    assert "Removed" in invoke("cache", *at, "--clear", "--yes").stdout
    assert list(folder.iterdir()) == []
