"""Log probabilities in OpenAI's two shapes: objects for chats, four parallel lists for completions."""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from typing import Any

from engine.output import TokenLogprob
from engine.tokenizer.tokenizer import Tokenizer

# JSON has no infinity; OpenAI writes this for tokens that cannot be sampled.
_IMPOSSIBLE = -9999.0


def chat_logprobs(tokenizer: Tokenizer, tokens: Iterable[TokenLogprob]) -> list[dict[str, Any]]:
    """One object per token: text, logprob, bytes, and the same for its alternatives."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        raw = tokenizer.token_bytes(token_id)
        return {"token": _text(raw), "logprob": _finite(logprob), "bytes": list(raw)}

    return [
        entry(token.token_id, token.logprob) | {"top_logprobs": [entry(*other) for other in token.top]}
        for token in tokens
    ]


class CompletionLogprobs:
    """Builds the lists of one completion; offsets go on from one piece to the next."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def render(self, tokens: Iterable[tuple[int, TokenLogprob | None]]) -> dict[str, list[Any]]:
        """`tokens`, `token_logprobs`, `top_logprobs` and `text_offset` of the next tokens.

        A token without logprob (the very first of a prompt) has None in both lists.
        """
        result: dict[str, list[Any]] = empty_logprobs()
        for token_id, logprob in tokens:
            raw = self._tokenizer.token_bytes(token_id)
            result["tokens"].append(_text(raw))
            result["text_offset"].append(self._offset)
            self._offset += len(self._decoder.decode(raw))
            if logprob is None:
                result["token_logprobs"].append(None)
                result["top_logprobs"].append(None)
            else:
                result["token_logprobs"].append(_finite(logprob.logprob))
                result["top_logprobs"].append(self._alternatives(logprob))
        return result

    def _alternatives(self, token: TokenLogprob) -> dict[str, float]:
        top = {_text(self._tokenizer.token_bytes(i)): _finite(logprob) for i, logprob in token.top}
        return top | {_text(self._tokenizer.token_bytes(token.token_id)): _finite(token.logprob)}


def empty_logprobs() -> dict[str, list[Any]]:
    """The four lists, with nothing in them."""
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}


def _finite(logprob: float) -> float:
    return max(logprob, _IMPOSSIBLE)


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "replace")
