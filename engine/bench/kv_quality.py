"""What rounding the KV cache changes: each format against float32, on a text.

Two shares of equal tokens. Of *predictions*: at how many places of the text both think the same token the
likeliest, when both have read the same. Of *answers*: both continue by themselves, so that behind the first
difference they say different things, and tokens that are the same there are so by chance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from engine.bench.answers import CHUNK, greedy
from engine.bench.evaluate import compare_rows
from engine.families.base import Batch, Model
from quant.formats.kv_names import KvFormat

PROMPT, ANSWER = 448, 64  # tokens


@dataclass(frozen=True)
class FormatQuality:
    """A format on a text, against float32.

    bytes_per_token    that a cache grows by
    kl                 mean over positions of KL(float32 || format), in nats
    equal_predictions  share of positions at which both think the same token the likeliest
    equal_answers      share of tokens of greedy answers that are the same; None where the text is too short
    whole_answers      share of answers of ANSWER tokens that are the same to their end
    """

    form: KvFormat
    bytes_per_token: float
    max_logit_error: float
    kl: float
    perplexity: float
    equal_predictions: float
    equal_answers: float | None
    whole_answers: float | None


@torch.inference_mode()
def compare_formats(
    load: Callable[[KvFormat], Model], forms: Sequence[KvFormat], windows: Sequence[list[int]]
) -> Iterator[FormatQuality]:
    """These formats of a model, float32 first, on windows of token ids. load: the model with such caches."""
    prompts = [
        window[start : start + PROMPT]
        for window in windows
        for start in range(0, len(window) - PROMPT - ANSWER + 1, PROMPT + ANSWER)
    ]
    exact: tuple[list[torch.Tensor], list[list[int]]] | None = None
    for form in forms:
        model = load(form)
        try:
            logits, answers = logits_of(model, windows), _answers(model, prompts)
            size = bytes_per_token(model)
        finally:
            model.close()
        exact = exact or (logits, answers)
        yield _compared(form, size, windows, exact, (logits, answers))


def float32_first(known: Sequence[KvFormat]) -> list[KvFormat]:
    """The same formats, in the order in which they are compared."""
    return ["float32", *(form for form in known if form != "float32")]


def bytes_per_token(model: Model) -> float:
    """Bytes that what is appended takes for each token."""
    cache = model.new_cache(1, min(1024, model.info.max_context))
    return sum(view[0].nbytes / ratio for ratio, view in cache.appended(0))


def _compared(
    form: KvFormat,
    size: float,
    windows: Sequence[list[int]],
    exact: tuple[list[torch.Tensor], list[list[int]]],
    found: tuple[list[torch.Tensor], list[list[int]]],
) -> FormatQuality:
    totals, error = torch.zeros(4, dtype=torch.float64), 0.0
    for window, before, after in zip(windows, exact[0], found[0], strict=True):
        error = max(error, float((before - after).abs().max()))
        totals += compare_rows(before[:-1], after[:-1], torch.tensor(window[1:]))
    _, likelihood, divergence, agreed = (totals / sum(len(window) - 1 for window in windows)).tolist()
    pairs = list(zip(exact[1], found[1], strict=True))
    same = [one == other for a, b in pairs for one, other in zip(a, b, strict=True)]
    return FormatQuality(
        form, size, error, divergence, math.exp(likelihood), agreed,
        sum(same) / len(same) if same else None,
        sum(a == b for a, b in pairs) / len(pairs) if pairs else None,
    )  # fmt: skip


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


def _answers(model: Model, prompts: Sequence[list[int]]) -> list[list[int]]:
    """What it says, greedily, behind each."""
    if not prompts:
        return []
    cache = model.new_cache(1, PROMPT + ANSWER)
    return [greedy(model, cache, prompt, ANSWER) for prompt in prompts]
