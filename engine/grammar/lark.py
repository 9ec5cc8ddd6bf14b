"""Grammars for answers, written in the dialect of Lark that `llguidance` reads.

A grammar is a main text of rules and named parts (JSON schemas, regular expressions, a client's own
grammars) that the rules refer to as `@name`. Added tokens are no text in it: a tag such as `</think>`
is that token where the vocabulary has it, else its characters.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import llguidance

from engine.grammar.client_lark import is_regular, lark_terminal, quoted_lark
from engine.grammar.finite import without_endless
from engine.grammar.numbers import check_multiples, with_safe_numbers

MAX_BYTES = 256 << 10

# Text, unlike the complement of a pattern, holds no broken characters and no added tokens.
ANY_TEXT = r"/(.|\n)*/"

# A space, or a line break with indentation: a model that may write any white space can write it for ever.
WHITE_SPACE = r" |\n[ ]{0,64}"


@dataclass(frozen=True)
class Grammar:
    """A grammar as the library takes it, and its parts by the field that each comes from.

    parts    (field of the request, that part alone), to find out which one is at fault
    """

    text: str
    parts: tuple[tuple[str, str], ...] = ()


class GrammarWriter:
    """Collects rules and parts. Methods return expressions to be used in rules.

    added_tokens    spelling -> id of the tokens that stand outside text
    """

    def __init__(self, added_tokens: Mapping[str, int]) -> None:
        self._added = added_tokens
        spellings = sorted(added_tokens, key=len, reverse=True)
        self._token = re.compile("|".join(map(re.escape, spellings)) or r"(?!)")
        self._rules: list[str] = []
        self._parts: list[dict[str, Any]] = []
        self._fields: list[str] = []
        self._alone: list[tuple[str, str]] = []

    def finished(self, start: str) -> Grammar:
        """The grammar of texts that match the expression `start`."""
        main = {"name": "main", "lark_grammar": "\n".join([f"start: {start}", *self._rules])}
        alone = (json.dumps({"grammars": [part]}) for part in self._parts)
        parts = (*self._alone, *zip(self._fields, alone, strict=True))
        return Grammar(json.dumps({"grammars": [main, *self._parts]}), parts)

    def rule(self, expression: str) -> str:
        """A rule of its own for `expression`."""
        name = f"rule_{len(self._rules)}"
        self._rules.append(f"{name}: {expression}")
        return name

    def terminal(self, pattern: str) -> str:
        """A terminal of its own for `pattern`, regular expressions between slashes."""
        name = f"TEXT_{len(self._rules)}"
        self._rules.append(f"{name}: {pattern}")
        return name

    def plain(self, text: str) -> str:
        """Exactly `text`, as text."""
        return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")  # Lark takes no raw DEL

    def literal(self, text: str) -> str:
        """Exactly `text`; token spellings in it are those tokens."""
        pieces, done = [], 0
        for match in self._token.finditer(text):
            pieces += [self.plain(text[done : match.start()]), f"<[{self._added[match.group()]}]>"]
            done = match.end()
        pieces.append(self.plain(text[done:]))
        return " ".join(piece for piece in pieces if piece != '""') or '""'

    def text_before(self, tag: str) -> str:
        """Any text that ends with the first `tag`, which is part of it."""
        match = self._token.search(tag)
        if match is None:
            name = f"rule_{len(self._rules)}"
            self._rules.append(f"{name}[lazy]: /(.|\\n)*{escaped(tag)}/")
            return name
        before, token, behind = tag[: match.start()], match.group(), tag[match.end() :]
        text = self.terminal(f"/(.|\\n)*{escaped(before)}/ & {_without(token)}")
        return f"{text} <[{self._added[token]}]> {self.literal(behind)}"

    def text_without(self, tag: str) -> str:
        """Any text, perhaps none, in which `tag` does not occur."""
        match = self._token.search(tag)
        return self.terminal(f"{ANY_TEXT} & {_without(tag if match is None else match.group())}")

    def limited_before(self, tag: str, pattern: str, padding: str) -> str:
        """Text by `pattern` (regular expressions between slashes) that ends with the first `tag`, which is
        part of it, behind `padding`, which is no part of the text."""
        match = self._token.search(tag)
        before = tag if match is None else tag[: match.start()]
        # One terminal as far as the characters go: a lexer does not give back what it has taken.
        parts = [f"({pattern} & {_without(tag if match is None else match.group())})"]
        parts += [self.plain(padding + before)] if padding + before else []
        rest = "" if match is None else f" {self.literal(tag[len(before) :])}"
        return self.terminal(" ".join(parts)) + rest

    def json(self, schema: Mapping[str, Any], field: str, *, lenient: bool = False) -> str:
        """JSON by a schema. `lenient` passes over keywords that cannot be enforced.

        Raises RequestError naming `field` for a schema without a finite document, and for numbers that
        cannot be enforced.
        """
        text = json.dumps(schema)
        if len(text) <= MAX_BYTES:  # others are refused when they are compiled
            schema = with_safe_numbers(schema, field, lenient=lenient)
            check_multiples(schema, field, merges='"$ref"' in text or '"allOf"' in text)
            schema = without_endless(schema, field) if '"$ref"' in text else schema
        guidance = {"whitespace_pattern": WHITE_SPACE, "lenient": lenient}
        return self._part({"json_schema": {**schema, "x-guidance": guidance}}, field)

    def regex(self, pattern: str, field: str) -> str:
        """Text that matches a regular expression as a whole; its \\d, \\w and \\s are ASCII."""
        return self._part({"lark_grammar": f"start: /{llguidance.regex_to_lark(pattern, 'dws')}/"}, field)

    def lark(self, text: str, field: str) -> str:
        """Text by a grammar of the client's own, which begins at its rule `start`."""
        return self._part({"lark_grammar": text}, field)

    def quoted_lark(self, text: str, field: str) -> str:
        """What stands between the quotes of a JSON string whose value follows a client's grammar.

        Raises RequestError naming `field` for a construct that cannot be enforced there.
        """
        self._check_alone(text, field)
        quoted = quoted_lark(text, field)
        if is_regular(quoted, field):
            return self._as_terminal(quoted, field)
        return self._part({"lark_grammar": quoted}, field)

    def lark_terminal(self, text: str, field: str) -> str:
        """A terminal for text by a client's grammar. Raises RequestError for one that refers to itself."""
        self._check_alone(text, field)
        return self._as_terminal(text, field)

    def _as_terminal(self, text: str, field: str) -> str:
        definitions, name = lark_terminal(text, f"CLIENT_{len(self._rules)}", field)
        self._rules += definitions
        return name

    def _check_alone(self, text: str, field: str) -> None:
        """Have a client's grammar compiled by itself where the whole fails, to tell whose fault that is."""
        self._alone.append((field, json.dumps({"grammars": [{"lark_grammar": text}]})))

    def _part(self, part: Mapping[str, Any], field: str) -> str:
        name = f"part_{len(self._parts)}"
        self._parts.append({"name": name, **part})
        self._fields.append(field)
        return f"@{name}"


def _without(text: str) -> str:
    return f"~/(.|\\n)*{escaped(text)}(.|\\n)*/"


def escaped(text: str) -> str:
    """What stands between slashes in a pattern for exactly `text`."""
    return re.sub(r"[.^$*+?()\[\]{}|\\/&~#-]", lambda match: "\\" + match.group(), text).replace("\n", "\\n")
