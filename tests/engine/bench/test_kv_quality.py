"""What rounding the KV cache changes is measured against float32."""

from __future__ import annotations

from functools import partial

import pytest

from engine.bench import kv_quality
from engine.bench.kv_quality import compare_formats, float32_first
from engine.embedded import embedded_text, model_path
from engine.families.base import Model
from engine.families.loader import OpenedModel, open_model
from memory.planner.budget import MemoryBudget
from quant.formats.kv_names import V41_FORMATS, KvFormat


def load(opened: OpenedModel, form: KvFormat) -> Model:
    return opened.load(MemoryBudget(1 << 30, kv_format=form)).model


@pytest.mark.slow
def test_formats_are_compared_on_a_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_quality, "PROMPT", 100)
    monkeypatch.setattr(kv_quality, "ANSWER", 20)
    path = model_path("demo")
    opened, text = open_model(path), embedded_text(path)
    assert text is not None
    ids = opened.tokenizer.encode(text.read_text())[:240]
    exact, bf16, vendor = compare_formats(partial(load, opened), ["float32", "bf16", "vendor"], [ids])
    assert (exact.kl, exact.max_logit_error, exact.equal_predictions, exact.equal_answers) == (0, 0, 1, 1)
    assert exact.bytes_per_token > bf16.bytes_per_token > vendor.bytes_per_token
    assert 0 < bf16.kl < vendor.kl < 0.2
    assert vendor.equal_predictions > 0.9
    assert vendor.equal_answers is not None
    assert bf16.perplexity == pytest.approx(exact.perplexity, rel=0.05)


def test_float32_comes_first() -> None:
    assert float32_first(V41_FORMATS) == ["float32", "vendor", "bf16", "fp8", "int8"]
