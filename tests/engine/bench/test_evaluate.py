"""Comparing two checkpoints on a text."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from engine.bench import evaluate
from engine.bench.evaluate import compare
from engine.families.base import Batch
from engine.families.loader import load
from memory.convert.files import convert_checkpoint
from memory.convert.plan import Choices
from quant.errors import ConfigError

GOLDEN = Path("tests/golden/v41-c")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("a model predicts the next token of this sentence, more or less well. " * 4)
    return file


def test_a_checkpoint_equals_itself(text: Path) -> None:
    found = compare(GOLDEN, GOLDEN, text)
    assert found.mean_kl == pytest.approx(0, abs=1e-7)
    assert found.top1_agreement == 1
    assert found.perplexity_before == found.perplexity_after


@pytest.mark.slow
def test_perplexity_is_that_of_the_next_tokens(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "WINDOW_TOKENS", 40)
    monkeypatch.setattr(evaluate, "CHUNK_TOKENS", 16)
    found = compare(GOLDEN, GOLDEN, text)
    loaded = load(GOLDEN)
    ids = loaded.tokenizer.encode(text.read_text(), add_special_tokens=True)
    losses = []
    for start in range(0, len(ids), 40):
        window = ids[start : start + 40]
        logits = loaded.model.forward(
            Batch.of([(0, 0, window)], all_logits=True), loaded.model.new_cache(1, len(window))
        )
        losses += torch.nn.functional.cross_entropy(
            logits[:-1], torch.tensor(window[1:]), reduction="none"
        ).tolist()
    assert found.tokens == len(losses)
    assert found.perplexity_before == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)


def test_lossless_conversion_changes_no_prediction(text: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    convert_checkpoint(GOLDEN, plain, Choices(dense=torch.bfloat16), lambda done, total: None)
    found = compare(GOLDEN, plain, text)
    assert found.top1_agreement == 1
    assert found.mean_kl < 1e-5


def test_text_without_anything_to_predict_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ConfigError, match="at least two are needed"):
        compare(GOLDEN, GOLDEN, tmp_path / "empty.txt")
