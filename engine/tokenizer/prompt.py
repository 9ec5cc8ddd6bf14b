"""Prompts to token ids: special tokens by position, everything else as text.

A text that spells a control token only where it is one goes through the library whole, so that what lies
beside a token (spaces it swallows, the mark that stands for a space in front of the text) is as in training.
Where something else spells one, it must stay text: then the real ones get names that the text cannot spell,
in an encoder that knows no others.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import tokenizers
from tokenizers import AddedToken

from quant.errors import RequestError

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
END = ""  # in a tree of characters: a token ends here
NOTHING = "(?!)"
PRIVATE_USE = range(0xE000, 0xF900)


def without_added_tokens(backend: tokenizers.Tokenizer, *, starts_text: bool = True) -> tokenizers.Tokenizer:
    """An encoder over the same vocabulary (shared, not copied) that knows no added tokens.

    `starts_text` false: one for text inside another, with no space put in front of it.
    """
    literal = tokenizers.Tokenizer(backend.model)
    parts = backend if starts_text else _parts_inside_text(backend)
    if parts.normalizer is not None:
        literal.normalizer = parts.normalizer
    if parts.pre_tokenizer is not None:
        literal.pre_tokenizer = parts.pre_tokenizer
    return literal


def _parts_inside_text(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """Normalizer and pre-tokenizer of `backend` without what puts a space in front of a text."""
    parts: dict[str, Any] = {"version": "1.0", "added_tokens": []}
    parts["model"] = {"type": "BPE", "vocab": {}, "merges": []}
    for name in ("normalizer", "pre_tokenizer"):
        part: Any = getattr(backend, name)
        parts[name] = None if part is None else _unprefixed(json.loads(part.__getstate__()))
    return tokenizers.Tokenizer.from_str(json.dumps(parts))


def _unprefixed(part: Any) -> Any:
    if isinstance(part, list):
        return [each for each in map(_unprefixed, part) if each is not None]
    if not isinstance(part, Mapping):
        return part
    if part.get("type") == "Prepend":
        return None
    off = {"prepend_scheme": "never", "add_prefix_space": False}
    return {name: off.get(name, _unprefixed(value)) for name, value in part.items()}


def encode_text(encoder: tokenizers.Tokenizer, text: str) -> list[int]:
    """Token ids of `text`, without added tokens. Raises RequestError for text that is not valid Unicode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"the text is not valid Unicode: lone surrogate at character {error.start}"
        ) from None
    # Only the library's batch calls release the GIL; a megabyte takes a second.
    try:
        ids: list[int] = encoder.encode_batch_fast([text], add_special_tokens=False)[0].ids
    except BaseException as error:  # a panic in the library is not an Exception
        if type(error).__name__ != "PanicException":
            raise
        raise RequestError(f"the model's tokenizer fails on this text ({error}); rephrase it") from None
    return ids


def unknown_token_id(backend: tokenizers.Tokenizer) -> int | None:
    """The unknown token."""
    model: Any = backend.model
    if hasattr(model, "unk_token"):
        return None if model.unk_token is None else backend.token_to_id(model.unk_token)
    unknown = json.loads(backend.to_str())["model"].get("unk_id")
    return unknown if isinstance(unknown, int) else None


def pattern_of(tokens: Iterable[str]) -> str:
    """A regular expression for the longest of `tokens` at a place; however many they are, it looks once."""
    tree: dict[str, Any] = {}
    for token in tokens:
        node = tree
        for character in token:
            node = node.setdefault(character, {})
        node[END] = {}
    return _pattern(tree) if tree else NOTHING


def _pattern(node: Mapping[str, Any]) -> str:
    common = ""
    while len(node) == 1 and END not in node:
        ((character, node),) = node.items()
        common += re.escape(character)
    branches = [re.escape(character) + _pattern(below) for character, below in node.items() if character]
    rest = f"(?:{'|'.join(branches)})" if branches else ""
    return common + (f"{rest}?" if END in node and rest else rest)


class PromptEncoder:
    """Encodes prompts of which it is known where `control` tokens (spelling -> id) stand.

    Other added tokens are found in the text wherever it spells them.
    """

    def __init__(self, backend: tokenizers.Tokenizer, control: Mapping[str, int]) -> None:
        self._backend = backend
        self._control = control
        self._spelling = re.compile(pattern_of(control))
        # A model may make these of ordinary text; those for what it cannot spell otherwise are no harm.
        unknown = unknown_token_id(backend)
        self._ids = {
            i: token for token, i in control.items() if i != unknown and not BYTE_TOKEN.fullmatch(token)
        }
        self._by_place = _ByPlace(backend, control, chr(PRIVATE_USE[0]))

    def encode(self, text: str, special_ranges: Iterable[tuple[int, int]]) -> list[int]:
        """Token ids of `text`; what lies in `special_ranges` becomes the token that it spells.

        Ranges are ascending, disjoint `[start, end)` offsets; one that spells no control token is text.
        """
        ranges = [(start, end) for start, end in special_ranges if text[start:end] in self._control]
        if ranges == [match.span() for match in self._spelling.finditer(text)]:
            ids = encode_text(self._backend, text)
            if self._count(ids) <= self._count(self._control[text[start:end]] for start, end in ranges):
                return ids
        return self._encode_by_place(text, ranges)

    def _count(self, ids: Iterable[int]) -> Counter[int]:
        return Counter(i for i in ids if i in self._ids)

    def _encode_by_place(self, text: str, ranges: list[tuple[int, int]]) -> list[int]:
        named = self._by_place
        if named.mark in text:
            self._by_place = named = _ByPlace(self._backend, self._control, unused_character(text))
        parts, done = [], 0
        for start, end in ranges:
            parts += [text[done:start], named.name(text[start:end])]
            done = end
        ids: list[int] = []
        for i in encode_text(named.encoder, "".join([*parts, text[done:]])):
            meant = named.meant.get(i)
            if meant is not None:
                ids.append(meant)
            else:
                ids += self.spelled_out(i)
        return ids

    def spelled_out(self, token_id: int) -> list[int]:
        """`token_id`, or where text alone made a control token of it, smaller tokens of the same spelling."""
        spelling = self._ids.get(token_id, "")
        if len(spelling) < 2:
            return [token_id]
        parts = (spelling[:1], spelling[1:])
        return [
            i for part in parts for t in self._backend.model.tokenize(part) for i in self.spelled_out(t.id)
        ]


class _ByPlace:
    """An encoder in which control tokens are spelled with a `mark`, a character that the text lacks.

    `meant` gives the id in the vocabulary of each added token's id in `encoder`.
    """

    def __init__(self, backend: tokenizers.Tokenizer, control: Iterable[str], mark: str) -> None:
        self.mark = mark
        self.encoder = without_added_tokens(backend)
        added = backend.get_added_tokens_decoder()
        control = set(control)
        # The library counts new ids from the vocabulary's size; where ids are left out, that is one in use.
        ids = backend.get_vocab(with_added_tokens=False).values()
        gaps = max(ids, default=-1) + 1 - len(ids)
        self.encoder.add_tokens([AddedToken(mark * (3 + n), normalized=False) for n in range(gaps)])
        named = {i: self._renamed(t) if t.content in control else t for i, t in added.items()}
        self.encoder.add_tokens(list(named.values()))
        self.meant = {self.encoder.token_to_id(token.content): i for i, token in named.items()}

    def name(self, token: str) -> str:
        """How the encoder spells a control token."""
        return self.mark + token + self.mark

    def _renamed(self, token: AddedToken) -> AddedToken:
        return AddedToken(
            self.name(token.content), lstrip=token.lstrip, rstrip=token.rstrip, normalized=False
        )


def unused_character(text: str) -> str:
    """A private-use character that `text` lacks. Raises RequestError if it has all of them."""
    for code in PRIVATE_USE:
        if chr(code) not in text:
            return chr(code)
    raise RequestError("the messages use every private-use character; remove some", param="messages")
