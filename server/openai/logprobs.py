"""Log probabilities in OpenAI's two shapes: objects for chats, four parallel lists for completions."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from typing import Any

from engine.output import TokenLogprob
from engine.tokenizer.tokenizer import Tokenizer

# JSON has no infinity; OpenAI writes this for tokens that cannot be sampled.
_IMPOSSIBLE = -9999.0


def chat_logprobs(tokenizer: Tokenizer, tokens: Iterable[TokenLogprob]) -> list[dict[str, Any]]:
    """One object per token: text, logprob, bytes, and the same for its alternatives."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": tokenizer.token_text(token_id),
            "logprob": _finite(logprob),
            "bytes": list(tokenizer.token_bytes(token_id)),
        }

    return [
        entry(token.token_id, token.logprob) | {"top_logprobs": [entry(*other) for other in token.top]}
        for token in tokens
    ]


class CompletionLogprobs:
    """Builds the lists of one completion; offsets go on from one piece to the next.

    start           where the first token's text stands; what lies before 0 is not told (the space that some
                    tokenizers put in front of a text)
    skip_special    special tokens are not told either
    """

    def __init__(self, tokenizer: Tokenizer, *, start: int = 0, skip_special: bool = False) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = start

    def render(self, tokens: Iterable[tuple[int, TokenLogprob | None]]) -> dict[str, list[Any]]:
        """`tokens`, `token_logprobs`, `top_logprobs` and `text_offset` of the next tokens.

        A token without logprob (the very first of a prompt) has None in both lists.
        """
        result: dict[str, list[Any]] = empty_logprobs()
        for token_id, logprob in tokens:
            result["tokens"].append(self._tokenizer.token_text(token_id))
            result["text_offset"].append(max(0, self._offset))
            told = b"" if token_id in self._skipped else self._tokenizer.token_bytes(token_id)
            self._offset += len(self._decoder.decode(told))
            if logprob is None:
                result["token_logprobs"].append(None)
                result["top_logprobs"].append(None)
            else:
                result["token_logprobs"].append(_finite(logprob.logprob))
                result["top_logprobs"].append(self._alternatives(logprob))
        return result

    def _alternatives(self, token: TokenLogprob) -> dict[str, float]:
        """Log probabilities by text; of tokens that read alike the chosen one, or else the likeliest, has the
        text, the others are called `token_id:N`."""
        chosen = self._tokenizer.token_text(token.token_id)
        found: dict[str, float] = {}
        for token_id, logprob in token.top:
            text = self._tokenizer.token_text(token_id)
            if token_id != token.token_id and (text == chosen or text in found):
                text = f"token_id:{token_id}"
            found[text] = _finite(logprob)
        return found | {chosen: _finite(token.logprob)}


def echoed_logprobs(
    tokenizer: Tokenizer, text: str, tokens: Sequence[tuple[int, TokenLogprob | None]]
) -> dict[str, list[Any]]:
    """The lists of a prompt's tokens, which end where its `text` ends."""
    spelled = b"".join(tokenizer.token_bytes(token_id) for token_id, _ in tokens)
    start = min(0, len(text) - len(spelled.decode(errors="replace")))
    return CompletionLogprobs(tokenizer, start=start).render(tokens)


def empty_logprobs() -> dict[str, list[Any]]:
    """The four lists, with nothing in them."""
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}


def _finite(logprob: float) -> float:
    return max(logprob, _IMPOSSIBLE)
