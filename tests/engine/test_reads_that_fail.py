"""Reads that fail or hang in the middle of serving: who is told, and that the rest goes on."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine.engine import Engine
from engine.families.base import Batch
from engine.families.loader import load
from engine.families.registry import family_of
from engine.output import FinishReason
from engine.sampling.params import SamplingParams
from memory.checkpoint.direct_reads import DirectFiles
from memory.checkpoint.gguf_files import open_gguf
from memory.checkpoint.reads import RowsOnDisk
from memory.checkpoint.safetensors_files import open_safetensors
from memory.planner.budget import MemoryBudget
from quant.errors import CheckpointError
from quant.kernels.choice import choose
from tests.conftest import golden_path
from tests.engine.chat.answers import Answer
from tests.engine.families.tiny_llama import tiny_values, write_gguf

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    return load_file(golden_path("v41-c") / "expected.safetensors")


@pytest.fixture
def engine() -> Iterator[Engine]:
    """With so small a budget that every step reads experts."""
    loaded = load(golden_path("v41-c"), MemoryBudget(1_500_000))
    engine = Engine(loaded.model, loaded.tokenizer, max_sequences=2, max_context=200, prefill_chunk=64)
    engine.start()
    yield engine
    engine.stop()
    loaded.model.close()


def test_a_request_whose_experts_cannot_be_read_is_told_and_the_next_is_answered(
    engine: Engine,
    expected: dict[str, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    ids, greedy = expected["input_ids"].tolist(), expected["greedy_ids"].tolist()

    def gone(*_: object) -> None:
        raise CheckpointError("shard: cannot be read at byte 0 (Input/output error)")

    with monkeypatch.context() as broken:
        broken.setattr(DirectFiles, "read", gone)
        failed = Answer()
        engine.submit(ids, GREEDY, failed)
        failed.wait()
    assert failed.finish_reason is FinishReason.ERROR
    assert failed.outputs[-1].error == "shard: cannot be read at byte 0 (Input/output error)"
    (said,) = (record for record in caplog.records if record.name == "loci.engine")
    assert "shard: cannot be read at byte 0" in said.getMessage()
    assert said.exc_info is None  # the message says it all
    answer = Answer()
    engine.submit(ids, GREEDY, answer)
    assert answer.wait().token_ids == greedy


def test_a_request_that_is_cancelled_while_the_disk_hangs_harms_nobody(
    engine: Engine, expected: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, greedy = expected["input_ids"].tolist(), expected["greedy_ids"].tolist()
    read, hangs, answers_again = DirectFiles.read, threading.Event(), threading.Event()

    def hanging(self: DirectFiles, *args: object) -> object:
        hangs.set()
        assert answers_again.wait(60)
        return read(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(DirectFiles, "read", hanging)
    cancelled, company = Answer(), Answer()
    ticket = engine.submit(ids, GREEDY, cancelled)
    assert hangs.wait(60)
    engine.submit(ids, GREEDY, company)
    engine.abort(ticket)
    answers_again.set()
    assert cancelled.wait().finish_reason is FinishReason.ABORT
    assert company.wait().token_ids == greedy


def test_a_request_whose_engram_rows_cannot_be_read_is_told_and_the_next_is_answered(
    expected: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    ids, greedy = expected["input_ids"].tolist(), expected["greedy_ids"].tolist()
    path = shutil.copytree(golden_path("v41-c"), tmp_path / "v41-c")
    loaded = load(path, MemoryBudget(1_500_000))
    engine = Engine(loaded.model, loaded.tokenizer, max_sequences=2, max_context=200, prefill_chunk=64)
    engine.start()
    shard = next(path.glob("model-00002-of-*.safetensors"))  # holds a table and nothing else
    content = shard.read_bytes()
    os.truncate(shard, 4096)
    failed = Answer()
    engine.submit(ids, GREEDY, failed)
    failed.wait()
    shard.write_bytes(content)
    answer = Answer()
    engine.submit(ids, GREEDY, answer)
    answer.wait()
    engine.stop()
    loaded.model.close()
    assert failed.finish_reason is FinishReason.ERROR
    assert failed.outputs[-1].error == f"{shard}: the file has been truncated; download it again"
    assert answer.token_ids == greedy


def test_a_model_that_is_held_in_memory_does_not_need_its_file_any_more(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf", tiny_values(), "Q4_1")
    model = family_of(open_gguf(file)).load(open_gguf(file), choose(), MemoryBudget(1 << 30))
    batch = Batch.of([(0, 0, [5, 6, 7])], all_logits=True)
    before = model.forward(batch, model.new_cache(1, 16))
    os.truncate(file, 0)
    assert torch.equal(model.forward(batch, model.new_cache(1, 16)), before)


def test_an_embedding_that_stays_on_disk_is_read_row_by_row(tmp_path: Path) -> None:
    path = shutil.copytree(golden_path("v41-c"), tmp_path / "v41-c")
    checkpoint = open_safetensors(path)
    entry = checkpoint.entries["embed.weight"]
    whole = checkpoint.read("embed.weight").view(torch.bfloat16).view(entry.shape)
    rows = RowsOnDisk(entry, torch.bfloat16)
    ids = torch.tensor([3, entry.shape[0] - 1, 3, 0])
    assert torch.equal(rows[ids], whole[ids])
    with pytest.raises(IndexError):
        rows[torch.tensor([entry.shape[0]])]
    os.truncate(entry.file, entry.offset)
    with pytest.raises(CheckpointError, match="ends at byte"):
        rows[ids]
