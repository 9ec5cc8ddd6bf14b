"""A client's Lark grammar where a tool call has it: between the quotes of a JSON string, or as one terminal
in front of a closing tag.

A call's argument that is JSON has the text with escapes: the grammar of the escaped text is the client's,
with each literal and each pattern rewritten. An argument that is plain text ends with a tag, and a lexer,
which takes as much as it can, would take the tag as well where a terminal of the client's allows it. So such
a grammar has to become one terminal, which can be told to stop there; those that refer to themselves cannot.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter

from engine.grammar.quoted_pattern import quoted_pattern, quoted_range, quoted_text
from quant.errors import RequestError

_TOKEN = re.compile(
    r"""
      (?P<comment>(?://|\#)[^\n]*)
    | (?P<range>"(?:\\.|[^"\\\n])"\s*\.\.\s*"(?:\\.|[^"\\\n])")
    | (?P<string>"(?:\\.|[^"\\\n])*"i?)
    | (?P<regex>/(?:\\.|[^/\\\n])+/[a-z]*)
    | (?P<import>%import\s+common\b[ \t]*(?:\.[ \t]*\w+(?:[ \t]*->[ \t]*\w+)?|\([\w\s,]*\)))
    | (?P<ignore>%ignore\b)
    | (?P<alias>->\s*\w+)
    | (?P<define>[?!]*[A-Za-z_][\w-]*\s*:)
    | (?P<name>[A-Za-z_][\w-]*)
    | (?P<times>~\s*[0-9]+(?:\s*\.\.\s*[0-9]+)?)
    | (?P<number>[0-9]+)
    | (?P<plain>\s+|\.\.|[|()\[\]{}*+?&~,.-])
    """,
    re.VERBOSE,
)

MAX_CHARACTERS = 256 << 10
_ESCAPE = "(?-i:"  # before what is written as an escape

# Of Lark's common terminals those that a JSON string writes differently.
_COMMON = {
    "ESCAPED_STRING": r'"([^"\\\n]|\\.)*"',
    "WS_INLINE": r"[ \t]+",
    "WS": r"[ \t\f\r\n]+",
    "CR": r"\r",
    "LF": r"\n",
    "NEWLINE": r"(\r?\n)+",
    "SH_COMMENT": r"#[^\n]*",
    "CPP_COMMENT": r"\/\/[^\n]*",
    "C_COMMENT": r"\/\*([^*]|\*+[^*\/])*\*+\/",
    "SQL_COMMENT": r"--[^\n]*",
}


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str


def quoted_lark(text: str, field: str) -> str:
    """The grammar of what stands between a JSON string's quotes where its value follows the grammar `text`.

    Raises RequestError naming `field` for a construct that has no such counterpart, and for a grammar that
    needs a lexer (it refers to itself, or skips text) which escapes would mislead: behind a terminal that
    may go on with an escape, one of another terminal could not begin.
    """
    tokens = _tokens(text, field)
    if any(token.text == "~" for token in tokens):  # what a negation takes need not be a string's inside
        raise RequestError(f"{field}: ~ is not supported in a tool's grammar", param=field)
    quoted = [_quoted(token, field) for token in tokens]
    escaping = {piece for piece in quoted if _ESCAPE in piece}
    if len(escaping) > 1 and (why := _why_not_regular(tokens)) is not None:
        text = "cannot be enforced in this model's calls, unless only one terminal has quotes, backslashes, "
        raise RequestError(f"{field}: {why} {text}and line breaks", param=field)
    return "".join(quoted)


def is_regular(text: str, field: str) -> bool:
    """Whether one terminal can take the same texts as the grammar `text`."""
    return _why_not_regular(_tokens(text, field)) is None


def lark_terminal(text: str, prefix: str, field: str) -> tuple[list[str], str]:
    """Definitions of terminals, whose names begin with `prefix`, and the name of the one that takes the same
    texts as the grammar `text`.

    Raises RequestError naming `field` for a grammar that refers to itself, or skips what it does not say.
    """
    tokens = _tokens(text, field)
    if (why := _why_not_regular(tokens)) is not None:
        text = f"{field}: {why} cannot be enforced in this model's calls, which end arguments with a tag"
        raise RequestError(text, param=field)
    pieces: list[str] = []
    imports: list[str] = []
    for token in tokens:
        match token.kind:
            case "import":
                for name, known in _imports(token):
                    imports.append(f"%import common.{name} -> {_named(known, prefix)}")
            case "alias" | "comment":
                pass
            case "define":
                pieces.append(f"{_named(_defined(token), prefix)}:")
            case "name":
                pieces.append(_named(token.text, prefix))
            case _:
                pieces.append(token.text)
    return ["".join(pieces).strip(), *imports], _named("start", prefix)


def _tokens(text: str, field: str) -> list[_Token]:
    if len(text) > MAX_CHARACTERS:
        what = f"a grammar of {len(text)} characters is longer than the limit of {MAX_CHARACTERS}"
        raise RequestError(f"{field}: {what}", param=field, code="invalid_grammar")
    tokens, done = [], 0
    while done < len(text):
        match = _TOKEN.match(text, done)
        if match is None:
            what = text[done:].split(maxsplit=1)[0][:40]
            raise RequestError(f"{field}: {what!r} is not supported in a tool's grammar", param=field)
        tokens.append(_Token(str(match.lastgroup), match.group()))
        done = match.end()
    return tokens


def _quoted(token: _Token, field: str) -> str:
    match token.kind:
        case "string":
            is_caseless = token.text.endswith("i")
            pattern = quoted_text(_decoded(token.text.removesuffix("i"), field))
            return f"/{pattern}/{'i' if is_caseless else ''}" if pattern else '""'
        case "range":
            first, last = (_decoded(end, field) for end in re.findall(r'"(?:\\.|[^"\\])"', token.text))
            return f"/{quoted_range(first, last)}/"
        case "regex":
            pattern, _, flags = token.text[1:].rpartition("/")
            if "x" in flags:
                raise RequestError(f"{field}: the flag x is not supported in a tool's grammar", param=field)
            return f"/{quoted_pattern(pattern, field, dot_is_any='s' in flags)}/{flags.replace('s', '')}"
        case "import":
            return "\n".join(_quoted_import(token, field))
        case "comment" | "alias":
            return ""
    return token.text


def _quoted_import(token: _Token, field: str) -> Iterator[str]:
    for name, known in _imports(token):
        if name in _COMMON:
            yield f"{known}: /{quoted_pattern(_COMMON[name], field)}/"
        else:
            yield f"%import common.{name} -> {known}"


def _imports(token: _Token) -> list[tuple[str, str]]:
    """Names of common terminals, each with what the grammar calls it."""
    what = token.text.partition("common")[2].strip()
    if what.startswith("("):
        return [(name, name) for name in re.findall(r"\w+", what)]
    name, _, known = what.lstrip(". \t").partition("->")
    return [(name.strip(), known.strip() or name.strip())]


def _named(name: str, prefix: str) -> str:
    """The terminal that stands for a rule or terminal of the client's."""
    kind = "T" if name.isupper() else "R"
    return f"{prefix}_{kind}_{name.upper().replace('-', '_')}"


def _defined(token: _Token) -> str:
    return token.text.rstrip(": \t\n").lstrip("?!")


def _why_not_regular(tokens: list[_Token]) -> str | None:
    """What keeps a grammar from being one terminal, None where nothing does."""
    uses: dict[str, set[str]] = {}
    current = ""
    for token in tokens:
        if token.kind == "ignore":
            return "%ignore"
        if token.kind == "define":
            current = _defined(token)
        elif token.kind == "name":
            uses.setdefault(current, set()).add(token.text)
    try:
        TopologicalSorter(uses).prepare()
    except CycleError as error:
        return f"the rule {error.args[1][0]}, which refers to itself,"
    return None


def _decoded(literal: str, field: str) -> str:
    try:
        return str(json.loads(literal))
    except ValueError:
        raise RequestError(f"{field}: {literal[:40]} is no string that can be read", param=field) from None
