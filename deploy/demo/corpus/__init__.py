"""Where the demonstration model's texts come from: one module per source, each yielding documents.

A document is a list of turns, `[(role, text), ...]`, with role `user`, `assistant` or `text`; a
single `text` turn is plain prose without a speaker. Every generator is a function of a
`random.Random`, so that a seed gives the same corpus everywhere.
"""

from __future__ import annotations

Turn = tuple[str, str]
Document = list[Turn]


def chat(*texts: str) -> Document:
    """A conversation that the user begins: user, assistant, user, assistant ..."""
    return [("assistant" if i % 2 else "user", text) for i, text in enumerate(texts)]


def prose(text: str) -> Document:
    """A text without speakers."""
    return [("text", text)]


def words_in(text: str) -> list[str]:
    """The words of a list that is written as running text."""
    return text.split()


def phrases_in(text: str) -> list[str]:
    """The phrases of a list that is written with semicolons between them."""
    return [" ".join(phrase.split()) for phrase in text.split(";")]


def pairs_in(text: str) -> dict[str, str]:
    """Left and right of each `left=right` phrase."""
    return dict(phrase.split("=") for phrase in phrases_in(text))
