"""Needles: short things said once, somewhere in a long context, and asked for at its end.

Two kinds. `find_in_text` says where a thing is, among sentences about nothing, and asks a model in its own
chat format: what it finds tells about its training as much as about its cache. `find_made` asks a model that
is made for it (needle_model.py) and finds what its cache has kept: there, the hay is some computed rows, over
and over, while needles and questions are computed where they stand.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine.bench.answers import greedy, prefill
from engine.bench.context import repeat_rows
from engine.bench.needle_model import BLOCK, VOCABULARY, WINDOW
from engine.families.base import Batch, KvCache, Model
from engine.families.loader import Loaded
from quant.formats.kv_names import KvFormat

PLACES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of needles, by what may stand before them
EACH = 4  # needles of a place

FILLER = (
    "The grass is green.", "The sky is blue.", "The sun is warm.", "The birds sing.", "Here we go again."
)  # fmt: skip
THINGS = ("key", "map", "coin", "drum", "lamp", "hat", "ring", "boat", "book", "bell", "scarf", "kite")
ROOMS = ("garden", "library", "museum", "forest", "castle", "cellar", "bakery", "village", "kitchen", "barn")
ANSWER_TOKENS = 16

HAY = 2048  # tokens of made hay that are computed
LEAST_MADE = 2 * HAY
FIRST = 512  # tokens of the made model that are hay, up to those that needles are made of
CUES = VOCABULARY - 3 * EACH * len(PLACES)


@dataclass(frozen=True)
class Found:
    """How many of the needles at one place of a context were found.

    context  tokens
    place    0 for its beginning, 1 for its end
    """

    form: KvFormat
    context: int
    place: float
    found: int
    asked: int


def find_in_text(loaded: Loaded, form: KvFormat, contexts: Sequence[int]) -> list[Found]:
    """What a model finds in text, in contexts of about so many tokens."""
    cache = loaded.model.new_cache(1, max(contexts))
    return [
        Found(form, context, place, sum(_finds(loaded, cache, context, place, n) for n in range(EACH)), EACH)
        for context in contexts
        for place in PLACES
    ]


def _finds(loaded: Loaded, cache: KvCache, context: int, place: float, number: int) -> bool:
    draw = random.Random(f"{place} {number}")
    thing, room = draw.choice(THINGS), draw.choice(ROOMS)
    needle, question = f"The {thing} was in the {room}.", f"Where is the {thing}?"
    hay = [*FILLER] * (1 + context // len(FILLER))
    while True:  # as many sentences as there is room for
        at = round(place * len(hay))
        prompt = _prompt(loaded, " ".join([*hay[:at], needle, *hay[at:], question]))
        if (excess := len(prompt) + ANSWER_TOKENS - context) <= 0 or not hay:
            break
        hay = hay[: -max(1, excess * len(hay) // (len(prompt) + 1))]
    answer = loaded.tokenizer.decode(greedy(loaded.model, cache, prompt, ANSWER_TOKENS))
    return room in answer


def _prompt(loaded: Loaded, text: str) -> list[int]:
    if loaded.chat is None:
        return loaded.tokenizer.encode(text, add_special_tokens=True)
    return loaded.chat.render({"messages": [{"role": "user", "content": text}]}).token_ids


@torch.inference_mode()
def find_made(model: Model, form: KvFormat, context: int) -> list[Found]:
    """What the model of needle_model.py finds in `context` tokens, LEAST_MADE at least."""
    draw = random.Random(context)
    hay = [draw.randrange(FIRST, CUES) for _ in range(HAY)]
    needles = [
        (place, (CUES + 2 * n, CUES + 2 * n + 1, VOCABULARY - 1 - n))
        for n, place in enumerate(sorted(PLACES * EACH))
    ]
    cache = model.new_cache(1, context)
    prefill(model, cache, hay)
    at, last = HAY, context - len(needles) - BLOCK
    for number, (place, tokens) in enumerate(needles):
        # Candidates are whole blocks: what follows from the cue has to be in the cue's.
        block = (HAY + int(place * (last - HAY - EACH * BLOCK))) // BLOCK + number % EACH
        at = _compute(model, cache, at, block * BLOCK, [*hay[:WINDOW], *tokens])
    last = _compute(model, cache, at, last - WINDOW, hay[:WINDOW])
    found = dict.fromkeys(PLACES, 0)
    for number, (place, (cue, _, answer)) in enumerate(needles):
        logits = model.forward(Batch.of([(0, last + number, [cue])]), cache)
        found[place] += int(logits[-1].argmax()) == answer
    return [Found(form, context, place, count, EACH) for place, count in found.items()]


def _compute(model: Model, cache: KvCache, at: int, begin: int, ids: Sequence[int]) -> int:
    """Compute tokens at `begin`, with repeated hay between `at` and there; where they end. Windows after
    repeated rows are not those of the tokens before: a window of hay stands between."""
    repeat_rows(cache, HAY, begin, start=at)
    model.forward(Batch.of([(0, begin, ids)]), cache)
    return begin + len(ids)
