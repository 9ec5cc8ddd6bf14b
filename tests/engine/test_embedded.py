"""Embedded models are found by name; a path that exists wins, and what is missing is said."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from engine import embedded
from engine.embedded import EMBEDDED, embedded_sampling, model_path
from quant.errors import ConfigError


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path | None]:
    """Where each embedded model is said to be; a test may take one away."""
    places: dict[str, Path | None] = {name: tmp_path / name for name in EMBEDDED}

    def standing_in(name: str) -> embedded.EmbeddedModel:
        return replace(EMBEDDED[name], find=lambda: places[name])

    monkeypatch.setattr(embedded, "EMBEDDED", {name: standing_in(name) for name in EMBEDDED})
    return places


def test_each_model_answers_to_its_name(models: dict[str, Path | None]) -> None:
    assert {name: model_path(Path(name)) for name in models} == models


def test_the_default_is_the_first_that_is_installed(models: dict[str, Path | None]) -> None:
    assert model_path(None) == models["demo"]
    models["demo"] = None
    assert model_path(None) == models["smollm2"]


def test_a_path_that_exists_wins_over_a_name(
    models: dict[str, Path | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    assert model_path(Path("demo")) == Path("demo")


def test_a_missing_model_is_refused_with_what_to_do(models: dict[str, Path | None]) -> None:
    models.update(demo=None, smollm2=None)
    with pytest.raises(ConfigError, match=r"no embedded model smollm2 .*make serve"):
        model_path(Path("smollm2"))
    with pytest.raises(ConfigError, match="no embedded model demo or smollm2"):
        model_path(None)


def test_a_path_stays_a_path_when_nothing_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    assert model_path(model_path("./org/model")) == tmp_path / "org" / "model"
    assert model_path("nothing.gguf") == Path("nothing.gguf")
    with pytest.raises(ConfigError, match=r"^org/model: no such file or directory, .*`loci pull org/model`"):
        model_path("org/model")


def test_only_embedded_models_bring_sampling_of_their_own(models: dict[str, Path | None]) -> None:
    smollm2 = models["smollm2"]
    assert smollm2 is not None
    assert embedded_sampling(smollm2)["temperature"] == 0.2
    assert embedded_sampling(smollm2.with_name("another")) == {}
