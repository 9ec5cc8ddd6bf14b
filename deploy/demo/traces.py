# ruff: noqa: E402 -- the repository root must be importable before its packages are
"""Record which experts and Engram rows the exported model uses on held-out text.

    python deploy/demo/traces.py

Writes `routing.safetensors` (read by `loci bench experts`) and `engram.safetensors` into
`deploy/demo/traces`, whole documents of every part in turn.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import torch

from data import read_documents
from engine.embedded import DEMO_NAME
from engine.families.base import Batch, Model, Trace
from engine.families.loader import load
from engine.record_routing import chosen_experts
from memory.engram.traces import FILE_NAME as ENGRAM_FILE
from memory.engram.traces import save_rows
from memory.experts.traces import FILE_NAME, RoutingTrace
from paths import demo_directory

# Together below a megabyte: 2 bytes for each of 6 x 2 experts, 4 for each of 2 x 8 rows, of every token.
TOKENS = 10_000
LONGEST = 1024  # of a document, this much is read


def in_turn(directory: Path, tokens: int) -> list[list[int]]:
    """Held-out documents of every part in turn, until they hold `tokens` tokens."""
    parts = [read_documents([file]) for file in sorted(directory.glob("heldout-*.safetensors"))]
    if not parts:
        raise SystemExit(f"{directory}: no held-out text; run `python deploy/demo/data.py` first")
    chosen: list[list[int]] = []
    for number in range(max(map(len, parts))):
        for part in parts:
            left = tokens - sum(map(len, chosen))
            if left <= 0:
                return chosen
            if number < len(part):
                chosen.append(part[number][: min(LONGEST, left)].tolist())
    return chosen


def record(model: Model, documents: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts `[tokens, layers, top_k]` and Engram rows `[tokens, tables, columns]` of all documents."""
    cache = model.new_cache(1, LONGEST)
    experts: list[torch.Tensor] = []
    rows: list[torch.Tensor] = []
    for ids in documents:
        cache.reset(0)
        trace = Trace()
        model.forward(Batch.of([(0, 0, ids)]), cache, trace)
        experts.append(chosen_experts(trace))
        rows.append(trace.values["engram_rows"][0])
    return torch.cat(experts), torch.cat(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dir", type=Path, default=demo_directory(), help="where the held-out text lies")
    parser.add_argument("--model", type=Path, default=HERE / DEMO_NAME, help="the exported checkpoint")
    parser.add_argument("--out", type=Path, default=HERE / "traces", help="directory of the traces")
    args = parser.parse_args()

    documents = in_turn(args.dir, TOKENS)
    loaded = load(args.model)
    experts, rows = record(loaded.model, documents)
    loaded.model.close()
    args.out.mkdir(parents=True, exist_ok=True)
    RoutingTrace(experts).save(args.out / FILE_NAME)
    save_rows(rows, args.out / ENGRAM_FILE)
    size = sum(file.stat().st_size for file in args.out.iterdir())
    print(f"{args.out}: {len(experts):,} tokens of {len(documents)} documents, {size / 1e3:,.0f} kB")


if __name__ == "__main__":
    main()
