"""What each format of the KV cache costs and changes: against float32, on the demonstration model's held-out
texts and on golden checkpoints of every kind of cache.

    python -m tests.bench.kv_formats [--tokens 8192] [--window 2048] [--golden] [--json FILE]

Held-out texts are those of `deploy/demo/data.py` that are generated without any download (stories, composed
documents), joined to windows. Every token but the last of a window is predicted. Equal greedy tokens: the
share of positions at which both formats think the same token the likeliest.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from engine.embedded import model_path
from engine.families.base import Batch, Model
from engine.families.loader import open_checkpoint
from engine.families.registry import family_of
from memory.planner.budget import MemoryBudget
from quant.formats.kv_names import KvFormat
from quant.kernels.choice import choose
from tests.conftest import golden_path
from tests.engine.families.golden_families import family_path

GOLDEN_SETS = (
    "v41-a", "v41-b", "v41-c", "deepseek_v4", "deepseek_v2", "deepseek_v3", "deepseek_v32", "kimi_k2",
    "glm_moe_dsa", "gpt_oss", "qwen3_moe", "qwen3_5_moe",
)  # fmt: skip
CHUNK = 512


@dataclass(frozen=True)
class Row:
    """A format on a text, against float32.

    bytes_per_token  that a cache grows by
    """

    model: str
    form: KvFormat
    bytes_per_token: float
    max_logit_error: float
    kl: float
    perplexity: float
    equal_greedy: float


def loaded(path: Path, form: KvFormat) -> Model:
    """A model whose caches are in this format."""
    checkpoint = open_checkpoint(path)
    return family_of(checkpoint).load(checkpoint, choose(), MemoryBudget(1 << 32, kv_format=form))


def formats_of(path: Path) -> Sequence[KvFormat]:
    """The formats that a model can have, float32 first."""
    checkpoint = open_checkpoint(path)
    known = family_of(checkpoint).kv_formats(checkpoint)
    return ("float32", *(form for form in known if form != "float32"))


@torch.inference_mode()
def logits_of(model: Model, windows: Sequence[list[int]]) -> list[torch.Tensor]:
    """Logits of every position of each window, `[tokens, vocab]`."""
    cache, found = model.new_cache(1, max(map(len, windows))), []
    for window in windows:
        cache.reset(0)
        parts = [
            model.forward(
                Batch.of([(0, start, window[start : start + CHUNK])], all_logits=True), cache
            ).clone()
            for start in range(0, len(window), CHUNK)
        ]
        found.append(torch.cat(parts))
    return found


def bytes_per_token(model: Model) -> float:
    """Bytes that what is appended takes for each token."""
    cache = model.new_cache(1, 1024)
    return sum(view[0].nbytes / ratio for ratio, view in cache.appended(0))


def measured(name: str, path: Path, windows: Sequence[list[int]]) -> list[Row]:
    """Every format of a model on these windows."""
    rows: list[Row] = []
    exact: list[torch.Tensor] = []
    for form in formats_of(path):
        model = loaded(path, form)
        found = logits_of(model, windows)
        exact = exact or found
        error, divergence, likelihood, equal, count = 0.0, 0.0, 0.0, 0, 0
        for window, before, after in zip(windows, exact, found, strict=True):
            error = max(error, float((before - after).abs().max()))
            first, second = before[:-1].double().log_softmax(-1), after[:-1].double().log_softmax(-1)
            divergence += float((first.exp() * (first - second)).sum())
            likelihood -= float(second.gather(1, torch.tensor(window[1:]).unsqueeze(1)).sum())
            equal += int((first.argmax(-1) == second.argmax(-1)).sum())
            count += len(window) - 1
        size = bytes_per_token(model)
        rows.append(
            Row(name, form, size, error, divergence / count, math.exp(likelihood / count), equal / count)
        )
        model.close()
    return rows


def held_out_windows(tokenizer_file: Path, tokens: int, window: int) -> list[list[int]]:
    """Held-out documents of the demonstration model, one behind the other, cut into windows."""
    demo = Path(__file__).parents[2] / "deploy" / "demo"
    sys.path.insert(0, str(demo))
    import tokenizers

    from corpus import composed, stories
    from data import COMPOSED, STORIES, chance, generated, hold_out, tokenise

    parts = (stories.document, STORIES, "stories"), (composed.document, COMPOSED, "composed")
    documents = [named for part in parts for named in hold_out(generated(*part))[1]]
    documents.sort(key=lambda named: chance(named[0], "order"))
    ids, _ = tokenise(tokenizers.Tokenizer.from_file(str(tokenizer_file)), documents)
    found = ids[:tokens].astype(int).tolist()
    return [found[start : start + window] for start in range(0, len(found) - window + 1, window)]


def golden_windows(name: str) -> tuple[Path, list[list[int]]]:
    """A golden checkpoint, and the texts that it has reference logits of."""
    path = golden_path(name) if name.startswith("v41") else family_path(name)
    expected = load_file(path / "expected.safetensors")
    return path, [ids.tolist() for key, ids in expected.items() if key.startswith("input_ids")]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--golden", action="store_true", help="the golden checkpoints too")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    path = model_path("demo")
    windows = held_out_windows(path / "tokenizer.json", asked.tokens, asked.window)
    subjects = [("demo", path, windows)]
    if asked.golden:
        subjects += [(name, *golden_windows(name)) for name in GOLDEN_SETS]
    print("| model | KV format | bytes a token | largest logit error | KL | perplexity | equal tokens |")
    print("|---|---|---|---|---|---|---|")
    rows = []
    for subject in subjects:
        for row in measured(*subject):
            print(
                f"| {row.model} | {row.form} | {row.bytes_per_token:,.1f} | {row.max_logit_error:.2g} "
                f"| {row.kl:.2g} | {row.perplexity:.4f} | {100 * row.equal_greedy:.2f} % |",
                flush=True,
            )
            rows.append(row)
    if asked.json is not None:
        asked.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
