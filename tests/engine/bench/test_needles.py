"""Needles in long contexts: the model that is made for them, and models that read text."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.bench.needle_model import write_needle_model
from engine.bench.needles import EACH, PLACES, find_in_text, find_made
from engine.cache.sparse import SparseCache
from engine.embedded import model_path
from engine.families.base import Batch, KvCache, Model
from engine.families.loader import OpenedModel, open_model
from memory.planner.budget import MemoryBudget
from quant.formats.kv_names import V41_FORMATS, KvFormat
from quant.formats.rows import bytes_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> OpenedModel:
    folder = tmp_path_factory.mktemp("made") / "needle"
    write_needle_model(folder)
    return open_model(folder)


def model_of(made: OpenedModel, form: KvFormat) -> Model:
    return made.load(MemoryBudget(1 << 30, kv_format=form)).model


@pytest.mark.parametrize("form", V41_FORMATS)
def test_every_needle_is_found_with_every_format(made: OpenedModel, form: KvFormat) -> None:
    found = find_made(model_of(made, form), form, 1 << 14)
    assert [(needle.place, needle.found) for needle in found] == [(place, EACH) for place in PLACES]


def test_a_needle_is_found_in_a_million_tokens(made: OpenedModel) -> None:
    assert all(needle.found == EACH for needle in find_made(model_of(made, "vendor"), "vendor", 1 << 20))


@pytest.mark.parametrize("part", ["index_keys", "entries"])
def test_without_what_the_cache_kept_none_is_found(
    made: OpenedModel, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(made, "vendor")
    forward = model.forward

    def forgetful(batch: Batch, cache: KvCache) -> object:
        if len(batch.ids) == 1:  # a question
            assert isinstance(cache, SparseCache)
            (source,) = cache.sources.values()
            bytes_of(getattr(source, part))[0, : batch.segments[0].start] = 0
        return forward(batch, cache)

    monkeypatch.setattr(model, "forward", forgetful)
    assert not any(needle.found for needle in find_made(model, "vendor", 1 << 13))


def test_the_made_model_is_the_same_every_time(made: OpenedModel, tmp_path: Path) -> None:
    write_needle_model(tmp_path / "again")
    for file in made.checkpoint.path.iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


def test_a_model_is_asked_in_text_at_every_place() -> None:
    opened = open_model(model_path("demo"))
    found = find_in_text(opened.load(MemoryBudget(1 << 30)), "float32", [128])
    assert [(needle.context, needle.place, needle.asked) for needle in found] == [
        (128, place, EACH) for place in PLACES
    ]
    assert found[-1].found > 0, "what was said just before is found"
