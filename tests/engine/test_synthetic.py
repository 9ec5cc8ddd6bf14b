"""Slices with random weights: laid out as released, loadable, finite, written whole or not at all."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from engine.families.base import Batch
from engine.families.deepseek_v41.config import parse_config
from engine.families.deepseek_v41.tensors import expected_tensors
from engine.families.loader import load, open_checkpoint
from engine.families.shapes import shape_of
from engine.synthetic import SHAPES, plan_slice, released_layers
from engine.tokenizer.synthetic import SPECIAL_TOKENS, synthetic_tokenizer
from engine.tokenizer.tokenizer import Tokenizer
from memory.checkpoint.random_files import write_checkpoint
from memory.checkpoint.safetensors_files import open_safetensors
from memory.planner.budget import MemoryBudget
from memory.planner.published import built_in
from quant.errors import BudgetError, ConfigError, LociError

ROWS = 2000


def ignore(done: int, total: int) -> None:
    """Progress that nobody watches."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("synth") / "tiny"
    write_checkpoint(plan_slice("v41-tiny", 8, ROWS), out, ignore)
    return out


def test_a_slice_has_exactly_the_tensors_of_the_family(tiny: Path) -> None:
    checkpoint = open_safetensors(tiny)
    checkpoint.verify(expected_tensors(parse_config(checkpoint.config), checkpoint))


def test_a_slice_loads_and_answers_finite_logits_that_differ_by_token(tiny: Path) -> None:
    loaded = load(tiny, MemoryBudget(64 << 20))
    try:
        ids = loaded.tokenizer.encode("a slice reads any text, and more than a window of it")
        cache = loaded.model.new_cache(1, 64)
        logits = loaded.model.forward(Batch.of([(0, 0, ids)], all_logits=True), cache)
    finally:
        loaded.model.close()
    assert logits.shape == (len(ids), SHAPES["v41-tiny"].vocab_size)
    assert logits.isfinite().all()
    assert 0.1 < logits.std() < 10
    assert len(logits.argmax(1).unique()) > 1


def test_each_engram_table_has_a_shard_of_its_own(tiny: Path) -> None:
    entries = open_safetensors(tiny).entries
    tables = {entry.file for name, entry in entries.items() if ".engram.embed." in name}
    assert len(tables) == 2
    for file in tables:
        assert all(".engram.embed." in name for name, entry in entries.items() if entry.file == file)


def test_eight_layers_show_every_kind_of_layer(tiny: Path) -> None:
    config = parse_config(open_safetensors(tiny).config)
    kinds = {
        (ratio, n in config.kv_source_layer_ids, n in config.index_source_layer_ids)
        for n, ratio in enumerate(config.compress_ratios)
    }
    assert kinds == {
        (0, False, False),
        (2, True, True),
        (2, False, False),
        (1, True, True),
        (1, False, True),
        (1, False, False),
    }
    assert len(config.engram_layer_ids) == 2


@pytest.mark.parametrize("layers", [3, 4, 5, 6, 7, 9, 17, 39, 40])
def test_slices_of_any_length_have_a_config_without_contradictions(layers: int) -> None:
    config = parse_config(plan_slice("v41-tiny", layers, ROWS).config)
    assert config.num_hidden_layers == layers
    assert config.engram_layer_ids[0] == 1


def test_all_layers_together_are_the_released_model() -> None:
    assert released_layers(40) == list(range(40))


def test_a_layer_weighs_what_the_released_models_does() -> None:
    plan = plan_slice("deepseek-v4.1-flash", 4, 240_000)
    released = built_in("deepseek-v4.1-flash").layers[2]
    bits = {"BF16": 16, "F32": 32}
    layer_2 = sum(
        torch.Size(tensor.shape).numel() * bits.get(tensor.dtype, 8) // 8
        for shard in plan.shards
        for name, tensor in shard.items()
        if name.startswith("layers.2.")
    )
    assert layer_2 == released.dense.nbytes + released.shared.nbytes + 384 * released.expert.nbytes


def test_the_same_seed_gives_the_same_bytes_on_any_number_of_threads(tiny: Path, tmp_path: Path) -> None:
    write_checkpoint(plan_slice("v41-tiny", 8, ROWS), tmp_path / "again", ignore, workers=3)
    write_checkpoint(plan_slice("v41-tiny", 8, ROWS), tmp_path / "other", ignore, seed=1)
    for file in tiny.iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()
    shard = "model-00002-of-00011.safetensors"
    assert (tiny / shard).read_bytes() != (tmp_path / "other" / shard).read_bytes()


def test_progress_ends_with_everything_written(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    write_checkpoint(plan_slice("v41-tiny", 3, ROWS), tmp_path / "out", lambda *now: seen.append(now))
    assert seen[-1][0] == seen[-1][1] > 0
    assert seen == sorted(seen)


def test_an_experts_shape_in_a_slice_is_seen_by_the_planner(tmp_path: Path) -> None:
    write_checkpoint(plan_slice("v41-tiny", 3, ROWS, experts=5), tmp_path / "out", ignore)
    assert [layer.experts for layer in shape_of(open_checkpoint(tmp_path / "out")).layers] == [5, 5, 5]


def test_a_full_disk_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("memory.checkpoint.random_files.shutil.disk_usage", lambda _: full)
    with pytest.raises(BudgetError, match=r"but only .* is free"):
        write_checkpoint(plan_slice("v41-tiny", 3, ROWS), tmp_path / "out", ignore)
    assert list(tmp_path.iterdir()) == []


def test_what_was_cut_short_leaves_nothing_behind(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(plan_slice("v41-tiny", 3, ROWS), tmp_path / "out", stop)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_directory_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(ConfigError, match="exists"):
        write_checkpoint(plan_slice("v41-tiny", 3, ROWS), tmp_path, ignore)
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("name", "layers", "rows"), [("v41-huge", 4, ROWS), ("v41-tiny", 2, ROWS), ("v41-tiny", 41, ROWS),
                                 ("v41-tiny", 4, 5)],
)  # fmt: skip
def test_slices_that_cannot_be_are_refused(name: str, layers: int, rows: int) -> None:
    with pytest.raises(LociError):
        plan_slice(name, layers, rows)


def test_the_tokenizer_gives_back_any_text() -> None:
    backend = synthetic_tokenizer(2000)
    tokenizer = Tokenizer(backend, bos_token_id=0, add_bos=True)
    text = "Grüße, 世界!  tabs\tand\nlines; the quick brown fox"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.size == 2000
    assert max(ids) > 300
    assert [backend.token_to_id(token) for token in SPECIAL_TOKENS] == list(range(len(SPECIAL_TOKENS)))
