"""Training can be stopped at any moment and goes on bit for bit; what it exports, the engine serves."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

import batches
import export
import shape
from batches import Corpus, Pass
from corpus import composed
from data import save_tokens, tokenise
from engine.families.base import Batch
from engine.families.deepseek_v41.config import parse_config
from engine.families.registry import family_of
from engine.layers.engram_hash import build_token_map
from layers import Precision
from memory.checkpoint.safetensors_files import open_safetensors
from memory.planner.budget import MemoryBudget
from model import Model
from optimisers import Muon, orthogonalise
from prompts import train_tokenizer
from quant.kernels.reference import ReferenceKernels
from released import from_released, read_files
from rows import RowFinder
from schedule import Schedule, Stage
from state import read_trained
from tables import FOLDS
from train import Trainer

TINY = {
    "hidden_size": 64, "moe_intermediate_size": 32, "num_attention_heads": 2, "head_dim": 32,
    "qk_rope_head_dim": 16, "q_lora_rank": 32, "o_lora_rank": 32, "n_routed_experts": 6, "sliding_window": 32,
    "index_topk": 8, "candidate_topk_blocks": 6, "engram_vocab_size": 101,
}  # fmt: skip
SCHEDULE = Schedule(
    0.003,
    512,
    (Stage("short", 768, 64, 128), Stage("long", 768, 96, 192, rounding=True, balance=False, decay=True)),
    advice={"composed": 0.3},
)


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data directory with a small corpus, and a shape to match."""
    monkeypatch.setattr(shape, "TEXT_CONFIG", shape.TEXT_CONFIG | TINY)
    monkeypatch.setattr(Precision, "products", torch.float32)
    documents = [(f"d{i}", composed.document(random.Random(i))) for i in range(60)]
    tokenizer = train_tokenizer([document for _, document in documents])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    save_tokens(tmp_path / "train-composed.safetensors", *tokenise(tokenizer, documents[:50]))
    save_tokens(tmp_path / "heldout-composed.safetensors", *tokenise(tokenizer, documents[50:]))
    return tmp_path


def tensors(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.state._tensors().items()}


@pytest.mark.slow
def test_an_interrupted_training_ends_like_an_uninterrupted_one(directory: Path) -> None:
    whole = Trainer(directory, SCHEDULE)
    whole.run(SCHEDULE.total)
    expected = tensors(whole)
    (directory / "state.safetensors").unlink()

    for until in (384, 1000, SCHEDULE.total):
        part = Trainer(directory, SCHEDULE)
        if (directory / "state.safetensors").exists():
            part.state.load(directory / "state.safetensors")
        part.run(until)
    got = tensors(part)

    assert part.state.progress == whole.state.progress
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


def test_a_pass_holds_each_document_as_often_as_the_mix_says(directory: Path) -> None:
    for times, counts in ((1.0, {1}), (2.0, {2}), (0.5, {0, 1}), (1.5, {1, 2})):
        corpus = Corpus(directory, {"composed": times}, {})
        rows = Pass.of(corpus, 64, 4, (1, 1)).rows
        beginnings = [document for row in rows for document, start, _ in row if start == 0]
        assert {beginnings.count(document) for document in range(len(corpus.documents))} == counts


def test_no_text_comes_again_while_another_waits(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "MOVED_ROWS", 0)
    corpus = Corpus(directory, {"composed": 3.0}, {})

    rows = Pass.of(corpus, 64, 4, (1, 1)).rows

    beginnings = [document for row in rows for document, start, _ in row if start == 0]
    third = len(corpus.documents)
    for i in range(3):
        assert set(beginnings[i * third : (i + 1) * third]) == set(range(third))


@pytest.mark.slow
def test_training_lowers_the_loss(directory: Path) -> None:
    trainer = Trainer(directory, SCHEDULE)
    stage = SCHEDULE.stages[0]
    batch = Pass.of(trainer.corpus, 64, trainer.step_tokens, (1, 1)).batch(0, 2)
    losses = [trainer.step(batch, stage, 0.003)["loss"] for _ in range(8)]
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.slow
def test_no_text_reads_tables_that_it_was_counted_in(directory: Path) -> None:
    trainer = Trainer(directory, SCHEDULE)
    documents = trainer.corpus.documents
    data = Pass.of(trainer.corpus, 64, trainer.step_tokens, (1, 1))
    batch = data.batch(0, 2)
    for row, numbers, folds in zip(data.rows, batch.documents, batch.folds, strict=False):
        for number, (document, _, _) in enumerate(row):
            (read,) = folds[numbers == number].unique().tolist()
            others = [d for i, d in enumerate(documents) if i % FOLDS != read]
            assert not any(d is documents[document] for d in others)
    rows, sets = trainer.find_rows(batch.ids, batch.documents), batch.folds.flatten()
    read_values = trainer.tables.values(rows, sets, rounding=False)
    for values, layer, places in zip(read_values, trainer.tables.layers, rows, strict=True):
        for token in (0, 17, 100):
            assert torch.equal(values[token], layer[sets[token], places[token]].flatten())


@pytest.mark.slow
def test_tables_are_counted_once_for_the_same_texts(directory: Path) -> None:
    first = Trainer(directory, SCHEDULE).tables.complete
    written = (directory / "tables.safetensors").stat().st_mtime_ns
    second = Trainer(directory, SCHEDULE).tables.complete
    assert (directory / "tables.safetensors").stat().st_mtime_ns == written
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    (directory / "train-composed.safetensors").rename(directory / "train-other.safetensors")
    save_tokens(directory / "train-composed.safetensors", np.arange(100) % 50, np.array([60, 40]))
    third = Trainer(directory, SCHEDULE).tables.complete
    assert not torch.equal(third[0], first[0])


def test_orthogonalised_matrices_have_singular_values_about_one() -> None:
    torch.manual_seed(0)
    for rows, cols in ((16, 48), (48, 16), (32, 32)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(3, rows, cols), torch.float32))
        assert float(values.min()) > 0.5
        assert float(values.max()) < 1.3


def test_matrices_that_stand_above_each_other_are_orthogonalised_apart() -> None:
    gate_and_up = torch.nn.Parameter(torch.zeros(2, 8, 4))
    gate_and_up.grad = torch.randn(2, 8, 4)
    alone = torch.nn.Parameter(torch.zeros(2, 4, 4))
    alone.grad = gate_and_up.grad[:, 4:].clone()
    for parameter, splits in ((gate_and_up, {gate_and_up: 2}), (alone, {})):
        muon = Muon([parameter], splits, torch.float32)
        muon.param_groups[0]["lr"] = 0.1
        muon.step()
    torch.testing.assert_close(gate_and_up[:, 4:], alone)


@pytest.mark.slow
def test_a_stop_signal_ends_training_after_the_step_at_hand(directory: Path) -> None:
    trainer = Trainer(directory, SCHEDULE)
    trainer.stop(15, None)
    trainer.run(SCHEDULE.total)
    assert trainer.state.progress.tokens == 0
    assert (directory / "state.safetensors").exists()


@pytest.mark.slow
def test_the_serving_family_computes_what_was_trained(directory: Path, tmp_path: Path) -> None:
    trainer = Trainer(directory, SCHEDULE)
    trainer.run(1000)
    config = trainer.config
    model = Model(config)
    tables, _ = read_trained(directory / "state.safetensors", model)
    out = tmp_path / "exported"
    out.mkdir()
    export.write_checkpoint(out, model, tables, directory / "tokenizer.json", 1000)
    export.check(out, model, tables)

    stored = Model(config).eval()
    stored_tables = from_released(stored, read_files(out))
    tokenizer_ids = torch.arange(11, 11 + 4 * config.sliding_window) % 300
    documents = torch.zeros(1, len(tokenizer_ids), dtype=torch.int64)
    rows = trainer.find_rows(tokenizer_ids.unsqueeze(0), documents)
    values = [table[r].flatten(1) for table, r in zip(stored_tables, rows, strict=True)]
    with torch.inference_mode():
        trained = stored.head(stored(tokenizer_ids.unsqueeze(0), documents, values).states)

    checkpoint = open_safetensors(out)
    served = family_of(checkpoint).load(checkpoint, ReferenceKernels(), MemoryBudget(1 << 30))
    cache = served.new_cache(1, len(tokenizer_ids))
    logits = served.forward(Batch.of([(0, 0, tokenizer_ids.tolist())], all_logits=True), cache)
    torch.testing.assert_close(logits, trained, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_training_goes_on_from_an_exported_checkpoint(directory: Path, tmp_path: Path) -> None:
    first = Trainer(directory, SCHEDULE)
    first.run(256)
    out = tmp_path / "exported"
    out.mkdir()
    export.write_checkpoint(out, first.model, first.tables.complete, directory / "tokenizer.json", 256)
    (directory / "state.safetensors").unlink()

    second = Trainer(directory, SCHEDULE)
    second.begin_with(out)

    assert second.state.progress.all_tokens == 256
    losses = []
    for trainer in (first, second):
        trainer.model.set_rounding(True)
        losses.append(trainer.held_out(96, rounding=True)["composed"])
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)

    (directory / "tokenizer.json").write_text("{}")
    with pytest.raises(SystemExit, match="another vocabulary"):
        second.begin_with(out)


@pytest.mark.slow
def test_export_refuses_files_that_differ_from_the_model(directory: Path, tmp_path: Path) -> None:
    trainer = Trainer(directory, SCHEDULE)
    tables = trainer.tables.complete
    out = tmp_path / "exported"
    out.mkdir()
    export.write_checkpoint(out, trainer.model, tables, directory / "tokenizer.json", 0)
    with torch.no_grad():
        trainer.model.norm.weight.mul_(2)
    with pytest.raises(SystemExit, match="differ from the model"):
        export.check(out, trainer.model, tables)


def test_the_demo_shape_is_one_that_the_family_accepts(directory: Path) -> None:
    config = parse_config(shape.config_for(directory / "tokenizer.json"))
    tokenizer_map = build_token_map(train_tokenizer([]), config.vocab_size)
    assert RowFinder(config, tokenizer_map).hashing.primes.min() >= config.engram_vocab_size
