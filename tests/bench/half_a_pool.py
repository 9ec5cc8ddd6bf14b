"""Eight sequences of mixed lengths with a KV pool for half of them: all end with the same text.

python -m tests.bench.half_a_pool [--longest 524288] [--tokens 400] [--json FILE]

A model of tiny widths with a context of a million tokens is made for it. Of each prompt, 1024 tokens and the
last are computed; between them, the rows of the former stand over and over, since nobody waits for such a
prefill. Sequences are put aside in memory, then on disk.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch

from engine.bench.context import repeat_rows
from engine.cache.aside import AsideOnDisk
from engine.engine import Engine
from engine.families.base import Batch, KvCache, Model, Segment
from engine.families.loader import Loaded, open_model
from engine.kv_pool import PoolSize
from engine.output import Output
from engine.sampling.params import SamplingParams
from engine.synthetic import plan_slice
from memory.checkpoint.random_files import write_checkpoint
from memory.hardware.detect import detect
from memory.hardware.this_machine import Result, write_results
from memory.planner.budget import MemoryBudget

CONTEXT = 1 << 20
BASE = 1024
CHUNK = 1 << 15  # tokens of a prompt at a time: most are not computed
SHARES = (1, 1 / 256, 1 / 2, 1 / 64, 3 / 4, 1 / 16, 1 / 4, 1 / 8)  # of the longest
ROOM = 4 << 30  # in memory or on disk, for what is put aside


class Skipping:
    """A model that computes of a prompt its first tokens and the last; the rest has their rows."""

    def __init__(self, model: Model) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def forward(self, batch: Batch, cache: KvCache) -> torch.Tensor:
        """Logits of the rows that are wanted."""
        wanted = set(range(len(batch.ids)) if batch.wanted is None else batch.wanted)
        last: list[tuple[int, int, Sequence[int]]] = []
        stop = 0
        for segment in batch.segments:
            begin, stop = stop, stop + segment.length
            self._fill(segment, batch.ids[begin:stop], cache, left=int(stop - 1 in wanted))
            if stop - 1 in wanted:
                last.append((segment.slot, segment.start + segment.length - 1, batch.ids[stop - 1 : stop]))
        if not last:
            return torch.empty(0, self._model.info.vocab_size)
        return self._model.forward(Batch.of(last), cache)

    def _fill(self, segment: Segment, ids: Sequence[int], cache: KvCache, left: int) -> None:
        """Give a slot the rows of a segment but for its `left` last tokens: computed before BASE only."""
        slot, start, length = segment
        computed = min(length - left, max(0, BASE - start))
        if computed:
            self._model.forward(Batch.of([(slot, start, ids[:computed])]), cache)
        if length - left > computed:
            repeat_rows(cache, BASE, start + length - left, slot, start=max(BASE, start))


def made_model(folder: Path) -> Loaded:
    """The model, with the vendor's KV formats."""
    write_checkpoint(plan_slice("v41-tiny", 6, 2000), folder, lambda done, of: None)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = CONTEXT
    (folder / "config.json").write_text(json.dumps(config))
    opened = open_model(folder)
    form = opened.family.kv_format(opened.checkpoint, "vendor")
    return opened.load(MemoryBudget(dram_bytes=1 << 30, kv_format=form))


def answers(engine: Engine, prompts: list[list[int]], tokens: int) -> tuple[list[list[int]], float]:
    """The tokens of all answers, asked for at once, and the seconds until the last."""
    found: list[list[int]] = [[] for _ in prompts]
    ended = [threading.Event() for _ in prompts]
    begun = time.perf_counter()
    engine.start()
    for number, prompt in enumerate(prompts):

        def on_output(output: Output, number: int = number) -> None:
            found[number] += output.token_ids
            if output.finish_reason is not None:
                ended[number].set()
                assert output.error is None, output.error

        asked = SamplingParams(temperature=1.0, seed=number, max_tokens=tokens, ignore_eos=True)
        engine.submit(prompt, asked, on_output)
    for event in ended:
        event.wait()
    engine.stop()
    return found, time.perf_counter() - begun


def _prompts_within(nbytes: int, sizes: list[int]) -> int:
    """Bytes of as many prompts, from the first on, as fit: what answers add then has no room."""
    found = 0
    for size in sizes:
        if found + size > nbytes:
            break
        found += size
    return found


def main() -> None:
    """Answer with all memory, then with half of it in three ways, and compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--longest", type=int, default=1 << 19)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        loaded = made_model(Path(folder) / "model")
        model = cast(Model, Skipping(loaded.model))
        generator = torch.Generator().manual_seed(0)
        lengths = [max(BASE + 2, int(share * asked.longest)) for share in SHARES]
        vocab = loaded.model.info.vocab_size
        prompts = [torch.randint(3, vocab, (length,), generator=generator).tolist() for length in lengths]
        context = max(lengths) + asked.tokens
        pages = loaded.model.new_cache(1, context).pages
        half = _prompts_within(sum(map(pages.nbytes, lengths)) // 2, list(map(pages.nbytes, lengths)))
        half = max(half, pages.nbytes(context))

        def run(nbytes: int | None, **options: Any) -> tuple[list[list[int]], Engine, float]:
            engine = Engine(
                model, loaded.tokenizer, max_sequences=len(prompts), max_context=context,
                prefill_chunk=CHUNK, pool=PoolSize(nbytes, is_given=True), **options,
            )  # fmt: skip
            found, seconds = answers(engine, prompts, asked.tokens)
            return found, engine, seconds

        expected, _, seconds = run(None)
        print(f"prompts of {', '.join(f'{length:,}' for length in lengths)} tokens")
        print(f"all memory: {seconds:.1f} s")
        for name, options in (
            ("memory", {"prefix_cache_bytes": ROOM}),
            ("disk", {"aside": AsideOnDisk(Path(folder) / "aside", ROOM)}),
        ):
            found, engine, seconds = run(half, **options)
            stats = engine.stats()
            assert stats.aside is not None
            same = sum(one == other for one, other in zip(found, expected, strict=True))
            within = stats.kv_peak_bytes <= stats.kv_budget_bytes
            print(
                f"half of it: {seconds:.1f} s, {same} of {len(prompts)} answers the same; put aside "
                f"{stats.aside.dram} times in memory, {stats.aside.disk} times on disk; at most "
                f"{stats.kv_peak_bytes / 1e6:,.1f} of {stats.kv_budget_bytes / 1e6:,.1f} MB taken"
            )
            results.append(Result(f"half_a_pool_same_{name}", same, "answers", 8, same == 8 and within))
    if asked.json is not None:
        write_results(asked.json, detect(), results)


if __name__ == "__main__":
    main()
