"""Log probabilities in OpenAI's two shapes: objects for chats, four parallel lists for completions."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from typing import Any

from engine.output import TokenLogprob
from engine.tokenizer.tokenizer import Tokenizer

# JSON has no infinity; OpenAI writes this for tokens that cannot be sampled.
_IMPOSSIBLE = -9999.0


def chat_logprobs(
    tokenizer: Tokenizer, tokens: Iterable[TokenLogprob], *, as_ids: bool = False
) -> list[dict[str, Any]]:
    """One object per token: text (or its id), logprob, bytes, and the same for its alternatives."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": _id_text(token_id) if as_ids else tokenizer.token_text(token_id),
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
    as_ids          tokens are called by their ids, not by their text
    """

    def __init__(
        self, tokenizer: Tokenizer, *, start: int = 0, skip_special: bool = False, as_ids: bool = False
    ) -> None:
        self._tokenizer = tokenizer
        self._text = _id_text if as_ids else tokenizer.token_text
        self._skipped = tokenizer.special_ids if skip_special else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = start

    def render(self, tokens: Iterable[tuple[int, TokenLogprob | None]]) -> dict[str, list[Any]]:
        """`tokens`, `token_logprobs`, `top_logprobs` and `text_offset` of the next tokens.

        A token without logprob (the very first of a prompt) has None in both lists.
        """
        result: dict[str, list[Any]] = empty_logprobs()
        for token_id, logprob in tokens:
            result["tokens"].append(self._text(token_id))
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
        chosen = self._text(token.token_id)
        found: dict[str, float] = {}
        for token_id, logprob in token.top:
            text = self._text(token_id)
            if token_id != token.token_id and (text == chosen or text in found):
                text = _id_text(token_id)
            found[text] = _finite(logprob)
        return found | {chosen: _finite(token.logprob)}


def prompt_logprobs(tokenizer: Tokenizer, told: Sequence[TokenLogprob | None]) -> list[dict[str, Any] | None]:
    """For each token of a prompt, as in vLLM, an object from ids to logprob, rank and text, of it and
    its alternatives; None for the first. The rank of a token that is not among these is not known."""

    def entries(token: TokenLogprob) -> dict[str, Any]:
        ranks = {token_id: rank for rank, (token_id, _) in enumerate(token.top, 1)}
        return {
            str(token_id): {
                "logprob": _finite(logprob),
                "rank": ranks.get(token_id),
                "decoded_token": tokenizer.token_text(token_id),
            }
            for token_id, logprob in ((token.token_id, token.logprob), *token.top)
        }

    return [None if token is None else entries(token) for token in told]


def echoed_logprobs(
    tokenizer: Tokenizer,
    text: str,
    tokens: Sequence[tuple[int, TokenLogprob | None]],
    *,
    as_ids: bool = False,
) -> dict[str, list[Any]]:
    """The lists of a prompt's tokens, which end where its `text` ends."""
    spelled = b"".join(tokenizer.token_bytes(token_id) for token_id, _ in tokens)
    start = min(0, len(text) - len(spelled.decode(errors="replace")))
    return CompletionLogprobs(tokenizer, start=start, as_ids=as_ids).render(tokens)


def empty_logprobs() -> dict[str, list[Any]]:
    """The four lists, with nothing in them."""
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}


def _id_text(token_id: int) -> str:
    return f"token_id:{token_id}"


def _finite(logprob: float) -> float:
    return max(logprob, _IMPOSSIBLE)
