"""A tool call in JSON, read while it is written: which call it is, and its arguments as they come."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field

ARGUMENTS = ("arguments", "parameters")
# What may stand in a call beside its name and arguments and says nothing that is lost without it.
LABELS = ("type", "id")
_OUTSIDE = re.compile(r'\s+|[{}\[\],:"]|[^\s{}\[\],:"]+')
_IN_STRING = re.compile(r'["\\]')
_FILLED = re.compile(r"\{\s*[^\s}]")


@dataclass(frozen=True)
class ReadCall:
    """A whole call: its name, its arguments as they were written, and members that are neither, as JSON."""

    name: str
    arguments: str
    others: str = ""


@dataclass
class _Value:
    """Where a member's value begins and ends (None: not yet)."""

    start: int
    end: int | None = None


@dataclass
class CallReader:
    """Reads one JSON object in text that comes in pieces. Raw control characters may stand in strings.

    text        what it has taken
    in_string   the text ends inside a string
    has_ended   the text is one object, or what is left of a broken one
    is_broken   it is not JSON; brackets and quotes are still followed, so that its end is found
    doubt       where a closing tag stands in a string: it is text if the string goes on as JSON does
    was_overrun  it did not, so the tag ended the call; `text` ends before it
    """

    text: str = ""
    in_string: bool = False
    has_ended: bool = False
    is_broken: bool = False
    doubt: int | None = None
    was_overrun: bool = False
    _open: list[str] = field(default_factory=list)
    _expected: str = "value"
    _key: str | None = None
    _string_start: int = 0
    _is_escaped: bool = False
    _in_literal: bool = False
    _values: dict[str, _Value] = field(default_factory=dict)

    def take(self, text: str) -> int:
        """How many characters of `text` belong to the object."""
        start = at = len(self.text)
        grown, self.text = self.text, ""  # held by one name alone a string grows in place
        grown += text
        self.text = grown
        while at < len(self.text) and not (self.has_ended or self.was_overrun):
            at = self._through_string(at) if self.in_string else self._outside(at)
        if self.was_overrun:
            return len(text)
        if at < len(self.text):
            self.text = self.text[:at]
        return at - start

    def take_doubtful(self, tag: str) -> None:
        """Take a closing tag inside a string, which may have ended the call."""
        if self.doubt is None:
            self.doubt = len(self.text)
        self.take(tag)

    def overrun(self) -> None:
        """Let the call end where it became doubtful."""
        self.text = self.text[: self.doubt]
        for value in self._values.values():
            if value.end is not None and value.end > len(self.text):
                value.end = None
        self.doubt = None
        self.was_overrun = True

    @property
    def name(self) -> str | None:
        """The name of the call, once it is known."""
        return _name(self._raw("name"))

    @property
    def first_key(self) -> str | None:
        """The key of the first member, once its value begins."""
        return next(iter(self._values), None)

    @property
    def arguments_start(self) -> int | None:
        """Where the arguments begin, once there is something in them."""
        for key, value in self._values.items():
            if key in ARGUMENTS and _FILLED.match(self.text, value.start):
                return value.start
        return None

    def arguments_end(self, start: int) -> int | None:
        """Where the arguments that begin at `start` end, once they did."""
        return next(value.end for value in self._values.values() if value.start == start)

    def others(self, start: int) -> str:
        """Of a call whose arguments begin at `start`: what comes with it and would be lost, as JSON."""
        end = self.arguments_end(start)
        if end is None:
            return ""
        if self.has_ended and not self.is_broken:
            others = (key for key, value in self._values.items() if value.start != start)
            return _as_object({key: self._raw(key) or "" for key in others})
        rest = self.text[end:]
        return rest if rest.strip("}, \t\r\n") else ""

    def whole(self) -> ReadCall | None:
        """The call that the object is; None where it is none."""
        if self.is_broken or not self.has_ended or not _is_json(self.text):
            return None
        members = {key: self._raw(key) or "" for key in self._values}
        if "name" not in members and members.get("function", "").startswith("{"):
            inner = CallReader()
            inner.take(members.pop("function"))
            named = {key: inner._raw(key) or "" for key in inner._values}
            if inner.is_broken or named.keys() & members.keys() - {*LABELS}:
                return None
            members |= named
        name = _name(members.pop("name", None))
        given = {key: _plain(members[key]) for key in ARGUMENTS if key in members}
        told = [text for text in given.values() if text != "{}"]
        others = _as_object({key: raw for key, raw in members.items() if key not in ARGUMENTS})
        if name is None or len(told) > 1 or (others and not told):
            return None
        return ReadCall(name, told[0] if told else "{}", others)

    def _raw(self, key: str) -> str | None:
        """The value of a member as it was written, once it has ended."""
        value = self._values.get(key)
        return None if value is None or value.end is None else self.text[value.start : value.end].rstrip()

    def _through_string(self, at: int) -> int:
        if self._is_escaped:
            self._is_escaped = False
            return at + 1
        found = _IN_STRING.search(self.text, at)
        if found is None:
            return len(self.text)
        at = found.end()
        if found.group() == "\\":
            self._is_escaped = True
            return at
        self.in_string = False
        if self._expected in ("key", "key or end"):
            self._expected = "colon"
            self._key = self.text[self._string_start : at] if len(self._open) == 1 else None
        else:
            self._value_ended(at)
        return at

    def _outside(self, at: int) -> int:
        found = _OUTSIDE.match(self.text, at)
        assert found is not None
        mark = found.group()
        if mark.isspace():
            self._in_literal = False
            return found.end()
        if mark == '"':
            self._string_start, self.in_string = at, True
            self._check(self._expected in ("key", "key or end") or self._value_begins(at))
        elif mark in "{[":
            self._check(self._value_begins(at))
            self._open.append(mark)
            self._expected = "key or end" if mark == "{" else "value or end"
        elif mark in "}]":
            self._close(mark, at)
        elif mark in ",:":
            self._check(self._expected == ("colon" if mark == ":" else "comma"))
            if mark == "," and len(self._open) == 1:
                self._value_ended(at)
            in_object = bool(self._open) and self._open[-1] == "{"
            self._expected = "key" if mark == "," and in_object else "value"
        elif not self._in_literal:
            self._check(self._value_begins(at))
            self._expected, self._in_literal = "comma", True
        if self.was_overrun:
            return at
        if mark in "{}[],:":
            self.doubt, self._in_literal = None, False
        return found.end()

    def _close(self, mark: str, at: int) -> None:
        opening, ready = ("{", "key or end") if mark == "}" else ("[", "value or end")
        self._check(self._open[-1:] == [opening] and self._expected in (ready, "comma"))
        if self.was_overrun:
            return
        if len(self._open) == 1 and self._expected == "comma":
            self._value_ended(at)
        del self._open[-1:]
        self._expected = "comma"
        if len(self._open) == 1:
            self._value_ended(at + 1)
        self.has_ended = not self._open

    def _value_begins(self, at: int) -> bool:
        """Note the beginning of a member's value; whether one may begin here."""
        if self._expected not in ("value", "value or end"):
            return False
        if len(self._open) == 1 and not self.is_broken:
            key = None if self._key is None else _string(self._key)
            if key is None or key in self._values:
                return False
            self._values[key] = _Value(at)
        return True

    def _value_ended(self, end: int) -> None:
        self._expected = "comma"
        if len(self._open) == 1 and self._values:
            value = list(self._values.values())[-1]
            value.end = end if value.end is None else value.end

    def _check(self, is_json: bool) -> None:
        if is_json or self.is_broken:
            return
        self.is_broken = True
        if self.doubt is not None:
            self.overrun()


def _as_object(members: dict[str, str]) -> str:
    """Members (as they were written) that say something, as one object; empty for none."""
    kept = {key: raw for key, raw in members.items() if key not in (*LABELS, "name")}
    kept = {key: raw for key, raw in kept.items() if key not in ARGUMENTS or _plain(raw) != "{}"}
    listed = ", ".join(f"{json.dumps(key, ensure_ascii=False)}: {raw}" for key, raw in kept.items())
    return f"{{{listed}}}" if kept else ""


def _plain(raw: str) -> str:
    """Arguments as they were written, without the quotes of those that are JSON in a string."""
    text = _string(raw)
    text = raw if text is None else text
    return "{}" if text.strip() in ("", "null") or re.fullmatch(r"\{\s*\}", text) else text


def _name(raw: str | None) -> str | None:
    """The name that `raw` is, unless it is empty or none."""
    return (raw and _string(raw)) or None


def _string(raw: str) -> str | None:
    """The string that JSON text stands for, valid Unicode; None where it is none."""
    try:
        value = json.loads(raw, strict=False)
    except (ValueError, RecursionError):
        return None
    return value.encode(errors="replace").decode() if isinstance(value, str) else None


def _is_json(text: str) -> bool:
    try:
        json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return False
    return True
