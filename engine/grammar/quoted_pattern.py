"""Regular expressions of text as it stands in a JSON string: the same text, with some characters escaped.

Each character has one spelling there, that of `json.dumps`. So an expression becomes one of the escaped text
by rewriting its characters and classes one by one; all else (repetition, choice, groups) stays.
"""

from __future__ import annotations

import json
import re

from quant.errors import RequestError

# What a JSON string writes as an escape.
_ESCAPES = {character: json.dumps(character)[1:-1] for character in [*map(chr, range(32)), '"', "\\"]}
_ESCAPED = r'["\\\x00-\x1f]'
_META = frozenset(r"\.+*?()|[]{}^$#&-~/")

_PIECE = re.compile(
    r"""
      (?P<property>\\[pP])
    | (?P<class>\\[dDwWsS])
    | (?P<code>\\(?:x[0-9A-Fa-f]{2}|x\{[0-9A-Fa-f]+\}|u[0-9A-Fa-f]{4}|u\{[0-9A-Fa-f]+\}))
    | (?P<control>\\[nrtfva])
    | (?P<literal>\\[^A-Za-z0-9])
    | (?P<unknown>\\.?)
    | (?P<set>\[\^?\]?(?:\\.|\[:\^?\w+:\]|[^\]\\])*\])
    | (?P<any>\.)
    | (?P<named>\(\?P?<\w+>)
    | (?P<flags>\(\?[a-zA-Z-]*[:)])
    | (?P<open>\()
    | (?P<close>\))
    | (?P<count>\{[0-9]+(?:,[0-9]*)?\}|[*+?])
    | (?P<edge>[|^$])
    | (?P<character>.)
    """,
    re.VERBOSE | re.DOTALL,
)
_CONTROLS = {"n": "\n", "r": "\r", "t": "\t", "f": "\f", "v": "\v", "a": "\a"}


def quoted_pattern(pattern: str, field: str, *, dot_is_any: bool = False) -> str:
    """A pattern of the escaped form of the texts that `pattern` takes; both as Lark has them between slashes.

    dot_is_any  the flag s: a dot takes line breaks, too

    Raises RequestError naming `field` for what cannot be rewritten.
    """
    pieces = []
    dots = [dot_is_any]  # the flag s in each group that is open
    for match in _PIECE.finditer(pattern):
        text = match.group()
        match match.lastgroup:
            case "property" | "unknown":
                raise RequestError(f"{field}: {text} is not supported in a tool's pattern", param=field)
            case "code":
                pieces.append(_character(chr(int(text[2:].strip("{}"), 16)), text))
            case "control":
                pieces.append(_character(_CONTROLS[text[1]], text))
            case "literal":
                pieces.append(_character(text[1], text))
            case "character":
                pieces.append(_character(text, text))
            case "class" | "set":
                pieces.append(_class(text, field))
            case "any":
                escaped = [each for each in _ESCAPES if dots[-1] or each != "\n"]
                pieces.append(_either(f"[^{_ESCAPED[1:-1]}]", escaped))
            case "flags":
                _read_flags(text, dots, field)
                pieces.append(text)
            case "named" | "open":
                dots.append(dots[-1])
                pieces.append("(")
            case "close":
                if len(dots) > 1:
                    dots.pop()
                pieces.append(text)
            case _:
                pieces.append(text)
    return "".join(pieces)


def quoted_text(text: str) -> str:
    """A pattern of exactly `text` as it is escaped."""
    return "".join(_character(each, "\\" + each if each in _META else each) for each in text)


def quoted_range(first: str, last: str) -> str:
    """A pattern of one character from `first` to `last` as it is escaped."""
    escaped = [each for each in _ESCAPES if first <= each <= last]
    between = f"[\\u{{{ord(first):x}}}-\\u{{{ord(last):x}}}]"
    return _either(f"[{between}--{_ESCAPED}]", escaped) if escaped else between


def _character(character: str, written: str) -> str:
    """A pattern of one character's escaped form; `written` is the pattern of the character itself."""
    return _exactly(_ESCAPES[character]) if character in _ESCAPES else written


def _exactly(escape: str) -> str:
    return f"(?-i:{''.join(chr(92) + c if c in _META else c for c in escape)})"


def _class(text: str, field: str) -> str:
    """A class of characters: those that stand as they are, or the escapes of the others."""
    # What Rust reads otherwise than Python: operations on classes, classes in classes, names.
    if re.search(r"&&|--|~~|\\[pPbBuU]|\\x\{|(?<!\\)(?!^)\[", text):
        raise RequestError(f"{field}: {text} is not supported in a tool's pattern", param=field)
    try:
        taken = re.compile(text, re.ASCII)
    except re.error as error:
        raise RequestError(f"{field}: {text} is no class of characters: {error}", param=field) from None
    escaped = [each for each in _ESCAPES if taken.fullmatch(each)]
    return _either(f"[{text}--{_ESCAPED}]", escaped) if escaped else text


def _either(plain: str, escaped: list[str]) -> str:
    # Behind the backslash that begins them all.
    endings = "|".join("".join(chr(92) + c if c in _META else c for c in _ESCAPES[e][1:]) for e in escaped)
    return rf"(?:{plain}|(?-i:\\(?:{endings})))"


def _read_flags(text: str, dots: list[bool], field: str) -> None:
    """Note what `(?flags)` or `(?flags:` say of dots."""
    on, _, off = text[2:-1].partition("-")
    if "x" in on:
        raise RequestError(f"{field}: the flag x is not supported in a tool's pattern", param=field)
    dot = True if "s" in on else False if "s" in off else dots[-1]
    if text.endswith(")"):
        dots[-1] = dot
    else:
        dots.append(dot)
