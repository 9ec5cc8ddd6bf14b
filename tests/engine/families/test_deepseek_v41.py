"""The V4.1 family against the golden checkpoints' float64 reference."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from engine.families.base import Batch, Trace
from engine.families.deepseek_v41.forward import DeepseekV41
from engine.families.registry import family_of
from memory.checkpoint.safetensors_files import open_safetensors
from memory.convert.files import convert_checkpoint
from memory.convert.plan import Choices
from memory.planner.budget import MemoryBudget
from quant.errors import BudgetError
from quant.formats.four_bit import FourBit
from quant.formats.int4 import INT4_GROUPS
from quant.formats.mxfp4 import MXFP4
from quant.formats.nf4 import NF4
from quant.kernels.choice import choose
from quant.kernels.reference import ReferenceKernels
from tests.conftest import golden_path

TOLERANCE = 1e-4
PLENTY = MemoryBudget(1 << 30)
NAMES = ("v41-a", "v41-b", "v41-c")


@dataclass(frozen=True)
class Golden:
    model: DeepseekV41
    ids: list[int]
    expected: dict[str, torch.Tensor]

    @property
    def logits(self) -> torch.Tensor:
        return self.expected["logits"]


_loaded: dict[str, Golden] = {}


def load_golden(name: str) -> Golden:
    if name not in _loaded:
        path = golden_path(name)
        checkpoint = open_safetensors(path)
        model = family_of(checkpoint).load(checkpoint, ReferenceKernels(), PLENTY)
        assert isinstance(model, DeepseekV41)
        expected = load_file(path / "expected.safetensors")
        _loaded[name] = Golden(model, expected["input_ids"].tolist(), expected)
    return _loaded[name]


@pytest.fixture(params=NAMES)
def golden(request: pytest.FixtureRequest) -> Golden:
    return load_golden(request.param)


def logits_in_chunks(golden: Golden, sizes: list[int]) -> torch.Tensor:
    """Logits of the golden prompt, computed in chunks of `sizes`, repeated until the prompt ends."""
    cache = golden.model.new_cache(1, len(golden.ids))
    out: list[torch.Tensor] = []
    start = 0
    for size in itertools.cycle(sizes):
        part = golden.ids[start : start + size]
        if not part:
            break
        out.append(golden.model.forward(Batch.of([(0, start, part)], all_logits=True), cache))
        start += len(part)
    return torch.cat(out)


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max().item() < TOLERANCE


def test_logits_of_the_whole_prompt_match_at_every_position(golden: Golden) -> None:
    assert_close(logits_in_chunks(golden, [len(golden.ids)]), golden.logits)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [[7], [64], [1, 64, 7, 3, 2, 33]], ids=["7", "64", "mixed"])
def test_logits_do_not_depend_on_how_the_prompt_is_cut(golden: Golden, sizes: list[int]) -> None:
    assert_close(logits_in_chunks(golden, sizes), golden.logits)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v41-a", "v41-c"])
def test_logits_match_token_by_token(name: str) -> None:
    golden = load_golden(name)
    assert_close(logits_in_chunks(golden, [1]), golden.logits)


@pytest.mark.slow
def test_token_by_token_after_a_prefill_matches(golden: Golden) -> None:
    prefilled = len(golden.ids) - 40
    assert_close(logits_in_chunks(golden, [prefilled, *[1] * 40]), golden.logits)


@pytest.mark.slow
def test_greedy_continuation_matches(golden: Golden) -> None:
    expected = golden.expected["greedy_ids"].tolist()
    cache = golden.model.new_cache(1, len(golden.ids) + len(expected))
    logits = golden.model.forward(Batch.of([(0, 0, golden.ids)]), cache)
    found = [int(logits.argmax())]
    while len(found) < len(expected):
        start = cache.length(0)
        logits = golden.model.forward(Batch.of([(0, start, found[-1:])]), cache)
        found.append(int(logits.argmax()))
    assert found == expected


def test_traces_match(golden: Golden) -> None:
    trace = Trace()
    cache = golden.model.new_cache(1, len(golden.ids))
    golden.model.forward(Batch.of([(0, 0, golden.ids)]), cache, trace)
    positions = golden.expected["trace_positions"]
    compared = 0
    for key, expected in golden.expected.items():
        if not key.startswith("trace."):
            continue
        found = trace.values[key.removeprefix("trace.")][0][positions]
        if "index_selected" in key:
            selected = torch.zeros_like(expected)
            for row, entries in enumerate(found):
                selected[row, entries[entries >= 0]] = 1
            assert torch.equal(selected, expected), key
        elif "router_ids" in key:
            assert torch.equal(found, expected), key
        else:
            assert (found - expected).abs().max().item() < TOLERANCE, key
        compared += 1
    assert compared >= golden.model.config.num_hidden_layers


def test_values_of_layers_are_kept_only_where_a_trace_is_passed_in(
    golden: Golden, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trace, "add", lambda *_: pytest.fail("kept without being asked for"))
    cache = golden.model.new_cache(1, len(golden.ids))
    golden.model.forward(Batch.of([(0, 0, golden.ids)]), cache)


def test_engram_rows_match_exactly(golden: Golden) -> None:
    trace = Trace()
    cache = golden.model.new_cache(1, len(golden.ids))
    golden.model.forward(Batch.of([(0, 0, golden.ids)]), cache, trace)
    assert torch.equal(trace.values["engram_rows"][0], golden.expected["engram_rows"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v41-a", "v41-c"])
def test_sequences_of_different_lengths_share_a_batch_without_noticing(name: str) -> None:
    golden = load_golden(name)
    lengths = [len(golden.ids), 1, 37, 90]
    cache = golden.model.new_cache(len(lengths), len(golden.ids))
    starts = [0] * len(lengths)
    found: list[list[torch.Tensor]] = [[] for _ in lengths]
    for step in range(1000):
        parts, owners = [], []
        for slot, length in enumerate(lengths):
            size = (1, 5, 16, 31)[(slot + step) % 4]
            part = golden.ids[starts[slot] : min(starts[slot] + size, length)]
            if part:
                parts.append((slot, starts[slot], part))
                owners.append(slot)
                starts[slot] += len(part)
        if not parts:
            break
        logits = golden.model.forward(Batch.of(parts, all_logits=True), cache)
        for slot, rows in zip(owners, logits.split([len(p[2]) for p in parts]), strict=True):
            found[slot].append(rows)
    for slot, length in enumerate(lengths):
        assert_close(torch.cat(found[slot]), golden.logits[:length])


def test_a_reused_slot_remembers_nothing() -> None:
    golden = load_golden("v41-a")
    cache = golden.model.new_cache(1, len(golden.ids))
    golden.model.forward(Batch.of([(0, 0, golden.ids[::-1][:100])]), cache)
    cache.reset(0)
    logits = golden.model.forward(Batch.of([(0, 0, golden.ids)], all_logits=True), cache)
    assert_close(logits, golden.logits)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_chosen_kernels_match_as_the_plain_ones_do(name: str) -> None:
    golden = load_golden(name)
    checkpoint = open_safetensors(golden_path(name))
    model = family_of(checkpoint).load(checkpoint, choose(), PLENTY)
    cache = model.new_cache(1, len(golden.ids))
    whole = model.forward(Batch.of([(0, 0, golden.ids)], all_logits=True), cache)
    assert_close(whole, golden.logits)
    cache.reset(0)
    stepwise = [
        model.forward(Batch.of([(0, start, golden.ids[start : start + size])], all_logits=True), cache)
        for start, size in ((0, 100), *((100 + i, 1) for i in range(30)))
    ]
    assert_close(torch.cat(stepwise), golden.logits[:130])


@pytest.mark.parametrize("name", NAMES)
def test_the_chosen_kernels_continue_greedily_as_the_reference_does(name: str) -> None:
    golden = load_golden(name)
    expected = golden.expected["greedy_ids"].tolist()
    checkpoint = open_safetensors(golden_path(name))
    model = family_of(checkpoint).load(checkpoint, choose(), PLENTY)
    cache = model.new_cache(1, len(golden.ids) + len(expected))
    found = [int(model.forward(Batch.of([(0, 0, golden.ids)]), cache).argmax())]
    while len(found) < len(expected):
        logits = model.forward(Batch.of([(0, cache.length(0), found[-1:])]), cache)
        found.append(int(logits.argmax()))
    assert found == expected


def test_dense_weights_that_do_not_fit_are_refused() -> None:
    checkpoint = open_safetensors(golden_path("v41-c"))
    with pytest.raises(BudgetError, match="the weights used by every token need"):
        family_of(checkpoint).load(checkpoint, choose(), MemoryBudget(1000))


def test_only_the_wanted_logits_are_computed() -> None:
    golden = load_golden("v41-c")
    cache = golden.model.new_cache(1, len(golden.ids))
    logits = golden.model.forward(Batch.of([(0, 0, golden.ids)]), cache)
    assert logits.shape == (1, golden.model.info.vocab_size)


def test_a_cache_refuses_more_tokens_than_it_holds() -> None:
    golden = load_golden("v41-c")
    cache = golden.model.new_cache(1, 16)
    with pytest.raises(BudgetError, match="17 tokens do not fit in a cache of 16"):
        golden.model.forward(Batch.of([(0, 0, golden.ids[:17])]), cache)


def test_cache_bytes_are_what_is_allocated() -> None:
    model = load_golden("v41-a").model
    cache = model.new_cache(3, 100)
    tensors = [*cache.windows, cache.history]
    for source in cache.sources.values():
        tensors += [source.entries, source.index_keys, source.open_kv, source.open_gate]
    assert model.cache_bytes(3, 100) == cache.nbytes == sum(t.nbytes for t in tensors)


def test_the_other_dialect_of_the_config_loads_to_the_same_model(checkpoint_copy: Path) -> None:
    from engine.families.deepseek_v41.config import SPELLINGS, parse_config

    released = json.loads((checkpoint_copy / "config.json").read_text())
    text = dict(released["text_config"])
    yarn = text.pop("rope_scaling")
    other: dict[str, Any] = {SPELLINGS.get(key) or key: value for key, value in text.items()}
    other |= {
        "rope_factor": yarn["factor"],
        "original_seq_len": yarn["original_max_position_embeddings"],
        "beta_fast": yarn["beta_fast"],
        "beta_slow": yarn["beta_slow"],
        "model_type": "deepseek_v41",
    }
    assert parse_config(other) == parse_config(released)
    (checkpoint_copy / "config.json").write_text(json.dumps(other))
    checkpoint = open_safetensors(checkpoint_copy)
    model = family_of(checkpoint).load(checkpoint, ReferenceKernels(), PLENTY)
    golden = load_golden("v41-c")
    logits = model.forward(Batch.of([(0, 0, golden.ids)], all_logits=True), model.new_cache(1, 150))
    assert_close(logits, golden.logits)


def converted(target: Path, choices: Choices) -> DeepseekV41:
    convert_checkpoint(golden_path("v41-c"), target, choices, lambda done, total: None, 1)
    checkpoint = open_safetensors(target)
    model = family_of(checkpoint).load(checkpoint, choose(), PLENTY)
    assert isinstance(model, DeepseekV41)
    return model


def test_a_checkpoint_with_dense_weights_in_bfloat16_answers_the_same(tmp_path: Path) -> None:
    golden = load_golden("v41-c")
    model = converted(tmp_path / "bf16", Choices(dense=torch.bfloat16))
    logits = model.forward(Batch.of([(0, 0, golden.ids)], all_logits=True), model.new_cache(1, 150))
    model.close()
    assert_close(logits, golden.logits)


@pytest.mark.parametrize("experts", [NF4, INT4_GROUPS[32]], ids=["nf4", "int4"])
def test_converted_experts_answer_as_exactly_as_their_format_allows(tmp_path: Path, experts: FourBit) -> None:
    """Each matrix is 6 to 10 % off, so three in a row are some 15 % off; another layout would be 140 %."""
    golden = load_golden("v41-c")
    model = converted(tmp_path / "experts", Choices(experts=experts, engram=MXFP4))
    x = torch.randn(16, 128, generator=torch.Generator().manual_seed(1))
    chosen = torch.arange(32).view(16, 2) % 8
    weights = torch.ones(16, 2)
    found, expected = (
        m.weights.experts.acquire(2, chosen).run(x, weights, 1.0) for m in (model, golden.model)
    )
    assert 0.01 < (found - expected).norm() / expected.norm() < 0.25
    logits = model.forward(Batch.of([(0, 0, golden.ids)]), model.new_cache(1, 150))
    model.close()
    assert bool(logits.isfinite().all())
