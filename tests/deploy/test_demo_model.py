"""The model that is trained computes what the served one computes: both meet the same reference vectors."""

from __future__ import annotations

import json
from functools import lru_cache, partial
from itertools import accumulate
from pathlib import Path

import pytest
import tokenizers
import torch
from safetensors.torch import load_file
from torch import Tensor

from engine.families.deepseek_v41.config import V41Config, parse_config
from engine.layers.engram_hash import build_token_map
from model import Model
from packing import alignment, pack
from released import from_released, read_files
from rows import RowFinder

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = {
    "v41-a": ROOT / "tests/golden/v41-a",
    "v41-b": ROOT.parent / "shared/golden/v41-b",
    "v41-c": ROOT / "tests/golden/v41-c",
}


def golden(name: str) -> tuple[V41Config, Path, dict[str, Tensor]]:
    path = GOLDEN[name]
    if not path.exists():
        pytest.skip(f"{path} is not here")
    config = parse_config(json.loads((path / "config.json").read_text()))
    return config, path, load_file(path / "expected.safetensors")


@lru_cache
def trained_form(name: str) -> tuple[Model, list[Tensor], RowFinder]:
    """A reference checkpoint as a training model, its Engram tables, and what addresses them."""
    config, path, _ = golden(name)
    model = Model(config).eval()
    tables = from_released(model, read_files(path))
    tokenizer = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    return model, tables, RowFinder(config, build_token_map(tokenizer, config.vocab_size))


def run(name: str, documents: list[Tensor]) -> tuple[Tensor, dict[str, Tensor], list[slice]]:
    """Logits of one row that holds the documents, its trace, and where each document lies."""
    model, tables, find = trained_form(name)
    step = alignment(model.config)
    window = model.config.sliding_window
    starts = list(accumulate((-(-len(d) // step) * step for d in documents), initial=0))
    ids, numbers = pack([[d.numpy() for d in documents]], -(-starts[-1] // window) * window, step)
    values = [table[rows].flatten(1) for table, rows in zip(tables, find(ids, numbers), strict=True)]
    trace: dict[str, Tensor] = {}
    with torch.inference_mode():
        logits = model.head(model(ids, numbers, values, trace).states)
    return logits, trace, [slice(s, s + len(d)) for s, d in zip(starts, documents, strict=False)]


@pytest.mark.parametrize("name", GOLDEN)
def test_training_forward_gives_the_reference_logits(name: str) -> None:
    expected = golden(name)[2]
    logits, _, (whole,) = run(name, [expected["input_ids"]])
    torch.testing.assert_close(logits[whole], expected["logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["v41-a", "v41-c"])
def test_every_intermediate_value_is_the_reference_one(name: str) -> None:
    expected = golden(name)[2]
    _, trace, _ = run(name, [expected["input_ids"]])
    at = expected["trace_positions"]
    checked = 0
    for key in (key.removeprefix("trace.") for key in expected if key.startswith("trace.")):
        want, got = expected[f"trace.{key}"], trace[key]
        if key.startswith("index_selected"):
            got = got[0][at, : want.shape[1]].to(want.dtype)
            assert torch.equal(got, want), key
        elif key.startswith("router_ids"):
            assert torch.equal(got[at].sort(-1).values, want.sort(-1).values), key
        elif key.startswith("router_weights"):
            torch.testing.assert_close(got[at].sort(-1).values, want.sort(-1).values, rtol=0, atol=1e-4)
        else:
            torch.testing.assert_close(got[at], want, rtol=1e-4, atol=1e-4, msg=partial("{}: {}".format, key))
        checked += 1
    assert checked > 20


def test_documents_packed_into_one_row_do_not_see_each_other() -> None:
    expected = golden("v41-a")[2]
    lengths = (77, 50, 33)
    logits, _, places = run("v41-a", [expected["input_ids"][:length] for length in lengths])
    for place, length in zip(places, lengths, strict=True):
        torch.testing.assert_close(logits[place], expected["logits"][:length], rtol=0, atol=1e-4)
