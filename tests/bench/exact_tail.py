"""A long prompt whose late layers compute only what its end looks back on, and all of it, in turns.

python -m tests.bench.exact_tail [MODEL] [--tokens 1900] [--chunk 512] [--rounds 5] [--json FILE]

The bound counts rows of layers, as if all layers cost the same and nothing else did.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch

from engine.embedded import model_path
from engine.families.base import Batch, KvCache, Segment
from engine.families.deepseek_v41.forward import DeepseekV41
from engine.families.loader import load
from memory.hardware.detect import detect
from memory.hardware.this_machine import write_results
from quant.bench.timing import Figure
from server.cli.bench.figures import print_figures, results_of


def prefill_s(model: DeepseekV41, cache: KvCache, ids: list[int], chunk: int, *, whole: bool) -> float:
    """Seconds that a prompt takes in chunks, up to the logits behind it."""
    cache.reset(0)
    started = time.perf_counter()
    for start in range(0, len(ids), chunk):
        part = ids[start : start + chunk]
        to_come = len(ids) - start - len(part)
        wanted = [] if to_come else [len(part) - 1]
        model.forward(
            Batch(part, (Segment(0, start, len(part)),), wanted, None if whole else (to_come,)), cache
        )
    return time.perf_counter() - started


def bound(model: DeepseekV41, tokens: int) -> float:
    """Rows of all layers, over those that are computed."""
    c = model.config
    tails = [
        min(tokens, c.tail_of(layer) + model.cache_shape.margin)
        for layer in range(c.first_tail_layer, c.num_hidden_layers)
    ]
    return c.num_hidden_layers * tokens / (c.first_tail_layer * tokens + sum(tails))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="demo", type=Path)
    parser.add_argument("--tokens", type=int, default=1900)
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    model = load(model_path(asked.model)).model
    assert isinstance(model, DeepseekV41)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, model.info.vocab_size, (asked.tokens,), generator=generator).tolist()
    cache = model.new_cache(1, asked.tokens)
    pairs = [
        (
            prefill_s(model, cache, ids, asked.chunk, whole=True),
            prefill_s(model, cache, ids, asked.chunk, whole=False),
        )
        for _ in range(asked.rounds + 1)
    ][1:]
    figures = [
        Figure("exact_tail_gain", statistics.median(a / b for a, b in pairs), "ratio"),
        Figure("exact_tail_bound", bound(model, asked.tokens), "ratio"),
        Figure("whole", statistics.median(a for a, _ in pairs), "s"),
        Figure("tail", statistics.median(b for _, b in pairs), "s"),
    ]
    print_figures("a prompt's end", figures)
    if asked.json is not None:
        write_results(asked.json, detect(), results_of(figures))


if __name__ == "__main__":
    main()
