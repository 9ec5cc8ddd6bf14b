"""What products in bfloat16 do to what a prompt's tokens predict: `python -m tests.bench.prompt_products`.

On the golden checkpoints (random weights), on held-out text of the demonstration model (of the generated
parts of its corpus), and on SmolLM2 with the same text, where that is installed.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from safetensors.torch import load_file

from engine.embedded import EMBEDDED
from engine.families.base import Batch, KvCache, Model
from engine.families.loader import open_model
from engine.families.registry import family_of
from memory.checkpoint.safetensors_files import open_safetensors
from memory.planner.budget import MemoryBudget
from quant.kernels.cpu.native import NativeKernels
from quant.kernels.interface import Products
from tests.conftest import ROOT, golden_path

TOKENS = 6_000  # of held-out text
LONGEST = 1024  # of a document, this much is read


@dataclass
class Difference:
    """Sums over the tokens of some text, exact against bfloat16."""

    tokens: int = 0
    largest: float = 0.0
    loss_exact: float = 0.0
    loss_bf16: float = 0.0
    divergence: float = 0.0
    agreed: int = 0

    def add(self, exact: torch.Tensor, bf16: torch.Tensor, following: torch.Tensor) -> None:
        """Count the logits `[tokens, vocab]` of both, and the tokens that followed."""
        self.largest = max(self.largest, float((exact - bf16).abs().max()))
        log_p, log_q = exact.double().log_softmax(-1), bf16.double().log_softmax(-1)
        self.divergence += float((log_p.exp() * (log_p - log_q)).sum())
        self.agreed += int((exact.argmax(-1) == bf16.argmax(-1)).sum())
        self.loss_exact -= float(log_p.gather(1, following.unsqueeze(1)).sum())
        self.loss_bf16 -= float(log_q.gather(1, following.unsqueeze(1)).sum())
        self.tokens += len(following)

    def describe(self) -> str:
        """One line of figures."""
        before, after = math.exp(self.loss_exact / self.tokens), math.exp(self.loss_bf16 / self.tokens)
        return (
            f"{self.tokens} tokens, largest difference of a logit {self.largest:.2g}, KL "
            f"{self.divergence / self.tokens:.2g}, perplexity {before:.4f} exact and {after:.4f} in bfloat16 "
            f"({after / before - 1:+.3%}), the same best token {self.agreed / self.tokens:.2%}"
        )


def main() -> None:
    kernels = NativeKernels()
    for name in ("v41-a", "v41-b", "v41-c"):
        golden(name, kernels)
    for name in ("demo", "smollm2"):
        path = EMBEDDED[name].find()
        if path is None:
            print(f"{name}: not installed")
            continue
        opened = open_model(path)
        model = opened.family.load(opened.checkpoint, kernels, MemoryBudget.of_this_machine())
        texts = (opened.tokenizer.encode(text, add_special_tokens=False) for text in held_out())
        compare(name, model, kernels, texts)
        model.close()


def golden(name: str, kernels: NativeKernels) -> None:
    """A golden prompt's logits in bfloat16, and what follows it greedily, decoded exactly."""
    checkpoint = open_safetensors(golden_path(name))
    expected = load_file(golden_path(name) / "expected.safetensors")
    ids, greedy = expected["input_ids"].tolist(), expected["greedy_ids"].tolist()
    model = family_of(checkpoint).load(checkpoint, kernels, MemoryBudget(1 << 30))
    found = Difference()
    cache = model.new_cache(1, len(ids) + len(greedy))
    logits = forward(model, kernels, "bf16", cache, ids)
    exact = expected["logits"].float()
    found.add(exact[:-1], logits[:-1], torch.tensor(ids[1:]))
    chosen = [int(logits[-1].argmax())]
    while len(chosen) < len(greedy):
        batch = Batch.of([(0, cache.length(0), chosen[-1:])])
        chosen.append(int(model.forward(batch, cache).argmax()))
    print(f"{name}: {found.describe()}, greedy text {'the same' if chosen == greedy else 'another'}")


def compare(name: str, model: Model, kernels: NativeKernels, texts: Iterator[list[int]]) -> None:
    """Both kinds of products on some texts, until these hold TOKENS tokens."""
    found, cache = Difference(), model.new_cache(1, LONGEST)
    for ids in (text[:LONGEST] for text in texts):
        if len(ids) > 1:
            exact, bf16 = (
                forward(model, kernels, products, cache, ids)[:-1] for products in ("exact", "bf16")
            )
            found.add(exact, bf16, torch.tensor(ids[1:]))
        if found.tokens >= TOKENS:
            break
    print(f"{name}: {found.describe()}")


def forward(
    model: Model, kernels: NativeKernels, products: Products, cache: KvCache, ids: list[int]
) -> torch.Tensor:
    """All logits of one text, `[tokens, vocab]`."""
    cache.reset(0)
    with kernels.multiplying(products):
        return model.forward(Batch.of([(0, 0, ids)], all_logits=True), cache).clone()


def held_out() -> Iterator[str]:
    """Texts that the demonstration model was not trained on, of both generated parts in turn."""
    sys.path.insert(0, str(ROOT / "deploy" / "demo"))
    import data
    from corpus import composed, stories
    from prompts import render

    parts = (
        data.hold_out(data.generated(make, count, seed))[1]
        for make, count, seed in (
            (stories.document, data.STORIES, "stories"),
            (composed.document, data.COMPOSED, "composed"),
        )
    )
    for pair in zip(*parts, strict=False):
        for _, document in pair:
            yield render(document, thinking=False)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
