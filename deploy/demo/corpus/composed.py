"""Conversations put together from greetings, questions of all kinds, stories and closings."""

from __future__ import annotations

import random

from corpus import Document, about_loci, chat, facts, manners, stories

SYSTEM_PROMPTS = [
    "You are a helpful assistant.",
    "Be kind.",
    "Answer briefly.",
    "You are a friendly assistant that gives short answers.",
    "You are the demonstration model of Loci.",
]


def middle(rng: random.Random) -> tuple[str, str]:
    """One exchange of any kind."""
    kind = rng.choices(("facts", "loci", "manners", "tale"), weights=(5, 2, 3, 1))[0]
    if kind == "facts":
        return facts.exchange(rng)
    if kind == "loci":
        return about_loci.exchange(rng)
    if kind == "manners":
        return manners.exchange(rng)
    return stories.tale(rng)


def document(rng: random.Random) -> Document:
    """A conversation of one to six exchanges."""
    exchanges = []
    if rng.random() < 0.35:
        exchanges.append(manners.pick(rng, manners.GREETINGS))
    exchanges += [middle(rng) for _ in range(rng.choice((1, 1, 2, 2, 3, 4)))]
    if rng.random() < 0.25:
        exchanges.append(manners.pick(rng, manners.CLOSINGS))
    turns = chat(*(text for exchange in exchanges for text in exchange))
    if rng.random() < 0.15:
        turns.insert(0, ("system", rng.choice(SYSTEM_PROMPTS)))
    return turns
