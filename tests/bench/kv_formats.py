"""What each format of the KV cache changes on golden checkpoints of every kind of cache: against float32.

    python -m tests.bench.kv_formats [--json FILE]

Their weights are random, which no rounding spares: this shows whether a format is broken. What rounding does
to a trained model, `loci bench context demo` measures.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from safetensors.torch import load_file

from engine.bench.kv_quality import compare_formats, float32_first
from engine.families.base import Model
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


def loaded(path: Path, form: KvFormat) -> Model:
    """A model whose caches are in this format."""
    checkpoint = open_checkpoint(path)
    return family_of(checkpoint).load(checkpoint, choose(), MemoryBudget(1 << 32, kv_format=form))


def formats_of(path: Path) -> Sequence[KvFormat]:
    """The formats that a model can have, float32 first."""
    checkpoint = open_checkpoint(path)
    known = family_of(checkpoint).kv_formats(checkpoint)
    return float32_first(known)


def golden_windows(name: str) -> tuple[Path, list[list[int]]]:
    """A golden checkpoint, and the texts that it has reference logits of."""
    path = golden_path(name) if name.startswith("v41") else family_path(name)
    expected = load_file(path / "expected.safetensors")
    return path, [ids.tolist() for key, ids in expected.items() if key.startswith("input_ids")]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    print("| model | KV format | bytes a token | largest logit error | KL | perplexity | equal tokens |")
    print("|---|---|---|---|---|---|---|")
    rows = []
    for name in GOLDEN_SETS:
        path, windows = golden_windows(name)
        for row in compare_formats(partial(loaded, path), formats_of(path), windows):
            print(
                f"| {name} | {row.form} | {row.bytes_per_token:,.1f} | {row.max_logit_error:.2g} "
                f"| {row.kl:.2g} | {row.perplexity:.4f} | {100 * row.equal_predictions:.2f} % |",
                flush=True,
            )
            rows.append({"model": name} | asdict(row))
    if asked.json is not None:
        asked.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
