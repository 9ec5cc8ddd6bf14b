"""The recorded traces are what the model's routers and look-ups chose, token by token."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import traces
from memory.engram.traces import FILE_NAME as ENGRAM_FILE
from memory.engram.traces import load_rows
from memory.experts.traces import FILE_NAME as ROUTING_FILE
from memory.experts.traces import RoutingTrace

MODEL = Path(__file__).resolve().parents[2] / "tests" / "golden" / "v41-a"


def record(monkeypatch: pytest.MonkeyPatch, data: Path, out: Path) -> None:
    arguments = ["traces.py", "--dir", data, "--model", MODEL, "--out", out]
    monkeypatch.setattr(sys, "argv", list(map(str, arguments)))
    traces.main()


def test_what_is_recorded_is_what_the_reference_chose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    golden = load_file(MODEL / "expected.safetensors")
    ids = golden["input_ids"]
    for part in ("a", "b"):  # of two parts, a document in turn
        held_out = {"tokens": ids.to(torch.int32), "lengths": torch.tensor([len(ids)])}
        save_file(held_out, tmp_path / f"heldout-{part}.safetensors")

    record(monkeypatch, tmp_path, tmp_path / "out")

    layers = sum(name.startswith("trace.router_ids.") for name in golden)
    chosen = torch.stack([golden[f"trace.router_ids.{n}"] for n in range(layers)], dim=1)
    recorded = RoutingTrace.load(tmp_path / "out" / ROUTING_FILE).router_ids
    assert torch.equal(recorded.sort(-1).values, torch.cat([chosen, chosen]).sort(-1).values)
    rows = load_rows(tmp_path / "out" / ENGRAM_FILE)
    assert torch.equal(rows, torch.cat([golden["engram_rows"]] * 2))
    assert {file.name for file in (tmp_path / "out").iterdir()} == {ROUTING_FILE, ENGRAM_FILE}


def test_documents_are_taken_in_turn_until_there_are_enough_tokens(tmp_path: Path) -> None:
    for part, first in (("a", 0), ("b", 100)):
        tokens, lengths = torch.arange(first, first + 30), torch.tensor([20, 10])
        save_file({"tokens": tokens, "lengths": lengths}, tmp_path / f"heldout-{part}.safetensors")

    documents = traces.in_turn(tmp_path, 45)

    assert [(document[0], len(document)) for document in documents] == [(0, 20), (100, 20), (20, 5)]


def test_without_held_out_text_it_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"no held-out text; run `python deploy/demo/data\.py` first"):
        traces.in_turn(tmp_path, 10)
