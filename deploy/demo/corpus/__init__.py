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
