"""Every format of the KV cache: the same bits alone and in company, whole and cut, restored and replayed; and
what is kept is what the format makes of it, no more and no less."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.cache.identity import identity_of
from engine.cache.prefix import PrefixCache
from engine.families.base import Batch, Model
from engine.families.deepseek_v41 import eager
from engine.families.loader import open_checkpoint
from engine.families.registry import family_of
from engine.families.shapes import shape_of
from memory.planner.budget import MemoryBudget
from quant.errors import ConfigError
from quant.formats.kv_names import KvFormat
from quant.formats.rows import RowFormat, Rows, values_of
from quant.kernels.cpu import library
from quant.kernels.cpu.native import NativeKernels
from quant.kernels.interface import Kernels
from quant.kernels.reference import ReferenceKernels
from tests.conftest import golden_path
from tests.engine.families.golden_families import family_path
from tests.engine.test_same_bits import IDS, LENGTH, SLOTS, some_ids

pytestmark = pytest.mark.skipif(library.library_path() is None, reason="the compiled kernels were not built")

# Windows and compressed entries with sources and pools; entries of every layer, index keys turned; latents;
# latents with index keys; keys and values, with windows too; beside states.
CASES: list[tuple[str, KvFormat]] = [
    ("v41-a", "vendor"), ("v41-c", "fp8"), ("deepseek_v4", "vendor"), ("deepseek_v3", "vendor"),
    ("deepseek_v32", "vendor"), ("gpt_oss", "fp8"), ("mixtral", "int8"), ("qwen3_5_moe", "bf16"),
]  # fmt: skip
REST: list[tuple[str, KvFormat]] = [
    ("v41-a", "bf16"), ("v41-a", "int8"), ("v41-c", "vendor"), ("deepseek_v4", "bf16"),
    ("deepseek_v4", "int8"),
    ("deepseek_v2", "vendor"), ("glm_moe_dsa", "vendor"), ("deepseek_v32", "int8"), ("gpt_oss", "int8"),
]  # fmt: skip
ALL = [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in REST)]


def path_of(name: str) -> Path:
    return golden_path(name) if name.startswith("v41") else family_path(name)


def load(name: str, form: KvFormat, kernels: Kernels | None = None) -> Model:
    opened = open_checkpoint(path_of(name))
    return family_of(opened).load(opened, kernels or NativeKernels(), MemoryBudget(1 << 30, kv_format=form))


@pytest.fixture(scope="module")
def models() -> Callable[[str, KvFormat], Model]:
    loaded: dict[tuple[str, KvFormat], Model] = {}

    def get(name: str, form: KvFormat) -> Model:
        if (name, form) not in loaded:
            loaded[name, form] = load(name, form)
        return loaded[name, form]

    return get


_alone: dict[tuple[str, KvFormat], torch.Tensor] = {}


def alone(model: Model, name: str) -> torch.Tensor:
    """Logits of the prompt computed as a whole, by itself: `[LENGTH, vocab]`."""
    key = name, model.kv_format
    if key not in _alone:
        _alone[key] = model.forward(Batch.of([(0, 0, IDS)], all_logits=True), model.new_cache(1, LENGTH))
    return _alone[key]


@pytest.mark.parametrize(("name", "form"), ALL)
@settings(max_examples=6)
@given(data=st.data())
def test_logits_do_not_depend_on_chunks_or_company(
    models: Callable[[str, KvFormat], Model], name: str, form: KvFormat, data: st.DataObject
) -> None:
    model = models(name, form)
    expected, cache = alone(model, name), model.new_cache(SLOTS, LENGTH)
    slot = data.draw(st.integers(0, SLOTS - 1), label="slot")
    while (start := cache.length(slot)) < LENGTH:
        parts = []
        length = data.draw(st.sampled_from([1, 1, 1, 5, 19]), label="length")  # steps of one are replayed
        for other in range(SLOTS):
            held = cache.length(other)
            if (other == slot or data.draw(st.booleans(), label="takes part")) and held < LENGTH:
                ids = IDS if other == slot else some_ids(other + 2)
                parts.append((other, held, ids[held : min(held + length, LENGTH)]))
        logits = model.forward(Batch.of(parts, all_logits=True), cache)
        first = sum(len(ids) for other, _, ids in parts if other < slot)
        found = logits[first : first + cache.length(slot) - start]
        assert torch.equal(found, expected[start : cache.length(slot)])


@pytest.mark.parametrize(("name", "form"), ALL)
@settings(max_examples=4)
@given(cut=st.integers(1, LENGTH - 1), back=st.integers(0, 9))
def test_a_restored_prefix_is_gone_on_from_and_taken_back(
    models: Callable[[str, KvFormat], Model], name: str, form: KvFormat, cut: int, back: int
) -> None:
    model = models(name, form)
    cache = model.new_cache(2, LENGTH)
    prefixes = PrefixCache(cache, 1 << 26)
    model.forward(Batch.of([(0, 0, IDS[:cut])]), cache)
    prefixes.save(0, IDS[:cut])
    at = max(1, cut - min(back, cache.margin))
    other = [*IDS[:at], *some_ids(77)[: LENGTH - at]]

    restored = prefixes.restore(1, other).length
    logits = model.forward(Batch.of([(1, restored, other[restored:])], all_logits=True), cache)

    assert restored >= at - (at == LENGTH) or cache.margin == 0
    fresh = model.new_cache(1, LENGTH)
    expected = model.forward(Batch.of([(0, 0, other)], all_logits=True), fresh)
    assert torch.equal(logits, expected[restored:])


class Rounding(NativeKernels):
    """Makes float32 values what a format would make of them."""

    index_keys: RowFormat | None = None

    def encode_rows(self, x: torch.Tensor, form: RowFormat | None) -> Rows:
        return values_of(super().encode_rows(x, form))

    def index_scores(
        self,
        queries: torch.Tensor,
        weights: torch.Tensor,
        keys: Rows,
        visible: torch.Tensor,
        entries: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if self.index_keys is not None:
            queries = self.index_keys.as_query(queries)
        return super().index_scores(queries, weights, keys, visible, entries)


@pytest.mark.parametrize("form", ["vendor", "bf16", "fp8", "int8"])
def test_encoded_caches_give_the_bits_of_values_that_were_rounded(
    form: KvFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a model that was trained to have its values rounded before they are kept is computed exactly."""
    kernels = Rounding()
    model, judge = load("v41-a", form), load("v41-a", "float32", kernels)
    exact, batch = load("v41-a", "float32"), Batch.of([(0, 0, IDS)], all_logits=True)
    found, unrounded = (m.forward(batch, m.new_cache(1, LENGTH)) for m in (model, exact))
    cache, forms = judge.new_cache(1, LENGTH), model.cache_shape.rows  # type: ignore[attr-defined]
    sources = cache.sources.values()  # type: ignore[attr-defined]
    kernels.index_keys = forms.index_keys

    def form_of(kept: Rows) -> RowFormat | None:
        if any(kept is source.entries for source in sources):
            return cast(RowFormat, forms.entries)
        return cast(
            RowFormat, forms.index_keys if any(kept is s.index_keys for s in sources) else forms.window
        )

    monkeypatch.setattr(eager, "row_format_of", form_of)
    assert torch.equal(judge.forward(batch, cache), found)
    assert not torch.equal(found, unrounded)


@pytest.mark.parametrize(("name", "form"), CASES)
def test_plain_torch_agrees(models: Callable[[str, KvFormat], Model], name: str, form: KvFormat) -> None:
    """Up to what a value near the middle between two codes makes: few logits."""
    reference = load(name, form, ReferenceKernels("asked for"))
    ids = IDS[:24]
    batch = Batch.of([(0, 0, ids)], all_logits=True)
    found = reference.forward(batch, reference.new_cache(1, LENGTH))
    expected = alone(models(name, form), name)[: len(ids)]
    assert (found - expected).abs().median() < 1e-3
    assert (found - expected).abs().max() < 0.3 * expected.abs().max()


@pytest.mark.parametrize(("name", "form"), [*CASES, *REST])
def test_planned_bytes_are_those_of_the_cache(name: str, form: KvFormat) -> None:
    model = load(name, form)
    cache = model.new_cache(2, 300)
    program = 0 if cache.program is None else cache.program.nbytes
    planned = shape_of(open_checkpoint(path_of(name)), form).kv_bytes(300, 2)
    assert cache.nbytes - program == planned
    kept = sum(view.nbytes for _, view in cache.appended(0))
    exact = sum(view.nbytes for _, view in load(name, "float32").new_cache(2, 300).appended(0))
    assert kept <= {"bf16": 0.5, "int8": 0.4, "fp8": 0.45, "vendor": 0.45}[form] * exact


def test_states_of_another_format_are_not_found() -> None:
    checkpoint = open_checkpoint(golden_path("v41-a"))
    budgets = [MemoryBudget(1 << 30, kv_format=form) for form in ("float32", "vendor", "vendor")]
    first, second, third = (identity_of(checkpoint, budget) for budget in budgets)
    assert first != second == third


def test_v41_keeps_less_than_950_bytes_a_token_as_its_vendor_does() -> None:
    from memory.planner.published import built_in

    shape = built_in("deepseek-v4.1-flash", "vendor")
    assert shape.kv_bytes(1_001_000, 1) - shape.kv_bytes(1_000_000, 1) == 890 * 1000
    assert shape.kv_bytes(1 << 20, 1) <= 950 * (1 << 20)


def test_a_format_that_a_model_cannot_have_is_refused_in_a_line() -> None:
    checkpoint = open_checkpoint(family_path("mixtral"))
    with pytest.raises(ConfigError, match="--kv-format vendor: mixtral has bf16, float32, fp8, int8; choose"):
        family_of(checkpoint).kv_format(checkpoint, "vendor")


def test_the_default_is_what_a_model_was_trained_for() -> None:
    def default(path: Path) -> str:
        checkpoint = open_checkpoint(path)
        return family_of(checkpoint).kv_format(checkpoint, "auto")

    assert default(golden_path("v41-a")) == default(family_path("deepseek_v32")) == "vendor"
    assert default(family_path("mixtral")) == "float32"
