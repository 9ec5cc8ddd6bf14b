"""Calls as elements with one parameter in each: Qwen3-Coder's and Qwen3.5's `<function=NAME>`, the `<invoke>`
of MiniMax and of DeepSeek V3.2, and the `<arg_key>` of GLM."""

from __future__ import annotations

import re
from dataclasses import dataclass

from engine.chat.call_forms import CallBlock, CallForm, CallPiece, Schemas
from engine.chat.tags import Item, Tag
from engine.chat.written_arguments import ArgumentsWriter

MAX_HEAD = 256  # a name or key, and what belongs to it
# What follows the quote before a name or key: DeepSeek V3.2 says of parameters whether they are strings.
_QUOTED = re.compile(r'([^"]+)"(?:\s+string="(true|false)")?')


@dataclass(frozen=True)
class ElementCalls(CallForm):
    """`begin (call NAME> (parameter KEY> VALUE end_parameter)* end_call)* end`.

    call        None where `begin` stands for one call, as its first element's name does (GLM)
    end_key     what ends a key, and `value` what opens its value; None where a `>` does both
    padded      values stand between line breaks that are no part of them
    may_skip    models leave `begin` out at times
    """

    begin: str
    end: str
    parameter: str
    end_parameter: str
    call: str | None = None
    end_call: str | None = None
    end_key: str | None = None
    value: str | None = None
    padded: bool = False
    may_skip: bool = False

    @property
    def tags(self) -> tuple[str, ...]:
        every = (
            self.begin, self.end, self.call, self.end_call,
            self.parameter, self.end_key, self.value, self.end_parameter,
        )  # fmt: skip
        return tuple(tag for tag in every if tag is not None)

    @property
    def openers(self) -> tuple[str, ...]:
        return (self.begin, self.call) if self.may_skip and self.call is not None else (self.begin,)

    def block(self, opener: str, schemas: Schemas) -> ElementBlock:
        return ElementBlock(self, opener, schemas)


class ElementBlock(CallBlock):
    """Reads the calls of an `ElementCalls`. A call is told with its first parameter, or at its end."""

    def __init__(self, form: ElementCalls, opener: str, schemas: Schemas) -> None:
        super().__init__()
        self._form = form
        self._schemas = schemas
        self._opened_by_call = opener == form.call
        self._state = "name" if self._opened_by_call or form.call is None else "between"
        self._written = opener  # of a call that is not told yet
        self._others = ""  # what calls have no place for
        self._head = ""
        self._name: str | None = None  # of the call at hand
        self._is_told = False
        self._arguments = ArgumentsWriter(None, padded=form.padded)

    def read(self, item: Item) -> tuple[list[CallPiece | str], list[Item]]:
        if isinstance(item, str):
            return self._read_text(item)
        if item.spelling not in self._form.tags:
            return self._read_text(item.spelling)
        if self._state == "value":
            if item.spelling != self._form.end_parameter:
                return self._read_text(item.spelling)
            self._state = "call"
            return self._tell(self._arguments.end()), []
        return self._pass(item)

    def finish(self) -> tuple[list[CallPiece | str], list[Item]]:
        pieces = self._end_call() if self._state == "call" and self._is_told else []
        return pieces + self._end(), []

    def _read_text(self, text: str) -> tuple[list[CallPiece | str], list[Item]]:
        if self._state == "value":
            return self._tell(self._arguments.add(text)), []
        if self._state in ("name", "key"):
            return self._read_head(text)
        if self._opened_by_call and self._state == "between" and self.has_calls and text.strip():
            return self._end(), [text]  # nothing else says that the block is over
        if self.has_calls:
            self._others += text
        else:
            self._written += text
        return [], []

    def _read_head(self, text: str) -> tuple[list[CallPiece | str], list[Item]]:
        head, end, rest = (text, "", "") if self._form.end_key else text.partition(">")
        self._head += head
        self._written += head + end
        if end or len(self._head) > MAX_HEAD:
            pieces = self._end_head()
            return pieces + self._end_if_broken(), [rest] if rest else []
        return [], []

    def _end_head(self) -> list[CallPiece | str]:
        """Take the name or the key that has been read."""
        head, self._head = self._head.strip(), ""
        is_text: bool | None = None
        if self._form.parameter.endswith('"'):
            found = _QUOTED.fullmatch(head)
            head = found.group(1) if found else ""
            is_text = None if found is None or found.group(2) is None else found.group(2) == "true"
        if not head or len(head) > MAX_HEAD or "\n" in head:
            self._state = "broken"
            return []
        if self._state == "key":
            self._state = "value"
            return self._tell(self._arguments.begin(head, is_text))
        self._state, self._name, self._is_told = "call", head, False
        self._arguments = ArgumentsWriter(self._schemas.get(head), padded=self._form.padded)
        return []

    def _pass(self, tag: Tag) -> tuple[list[CallPiece | str], list[Item]]:
        form, spelling = self._form, tag.spelling
        pieces: list[CallPiece | str] = []
        if self._state == "name" and form.end_key and self._head.strip():
            pieces += self._end_head()  # GLM's name ends where anything else begins
        if spelling == form.begin and form.call is None:
            return pieces + self._end_call() + self._end(), [tag]
        if spelling in (form.end, form.end_call, form.call):
            pieces += self._end_call()
        self._written += spelling
        if spelling == form.end:
            return pieces + self._end(), []
        if spelling == form.call:
            self._state, self._head = "name", ""
        elif spelling == form.parameter and self._state == "call":
            self._state, self._head = "key", ""
        elif spelling == form.end_key and self._state == "key":
            self._state = "before value"
        elif spelling == form.value and self._state == "before value":
            self._state = "key"
            pieces += self._end_head()
        elif self._state in ("name", "key", "before value"):
            self._state = "broken"
        return pieces + self._end_if_broken(), []

    def _tell(self, arguments: str) -> list[CallPiece | str]:
        if not arguments:
            return []
        self._written = ""
        if self._is_told:
            return [CallPiece(arguments)]
        self._is_told, self.has_calls = True, True
        return [CallPiece(arguments, self._name)]

    def _end_call(self) -> list[CallPiece | str]:
        """End the call at hand, where there is one."""
        is_call = self._name is not None and (self._is_told or self._state == "call")
        pieces = self._tell(self._arguments.close()) if is_call else []
        self._state, self._name = "between", None
        return pieces

    def _end_if_broken(self) -> list[CallPiece | str]:
        return self._end() if self._state == "broken" and not self.has_calls else []

    def _end(self) -> list[CallPiece | str]:
        """End the block; what of it is no call is text."""
        return self._end_with(self._others + self._written, self._form.tags)
