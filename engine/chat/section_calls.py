"""Calls whose head and arguments are set off by tokens, the arguments as JSON: Kimi, DeepSeek V3 to V3.1, and
Mistral's newer models."""

from __future__ import annotations

import re
from dataclasses import dataclass

from engine.chat.call_forms import CallBlock, CallForm, CallPiece, Schemas
from engine.chat.tags import Item, Tag

# Kimi's `functions.NAME:INDEX`, which is the call's id too.
_NUMBERED = re.compile(r"(?:functions\.)?(.+?):\d+")
# DeepSeek V3 and R1 write the name behind the separator, and the arguments in a fence.
_NAME_AND_FENCE = re.compile(r"\s*([^\s{][^\n{]*?)[ \t]*\n\s*(?:```[a-z]*\s*)?")
_BEHIND = "` \t\r\n"  # what may turn out to stand behind the arguments: white space and the end of a fence


@dataclass(frozen=True)
class SectionCalls(CallForm):
    """`begin (call HEAD separator ARGUMENTS end_call)* end`.

    call, end_call, end     None where there is none: `begin` opens each call, and the next one ends it
    call_id                 what stands between a name and an id in a head
    numbers                 a head is the call's id, which the model is to see again
    fences                  a head may be the word `function`, with the name in front of fenced arguments
    """

    begin: str
    separator: str
    call: str | None = None
    end_call: str | None = None
    end: str | None = None
    call_id: str | None = None
    numbers: bool = False
    fences: bool = False
    ends_reasoning: bool = False

    @property
    def tags(self) -> tuple[str, ...]:
        every = (self.begin, self.call, self.call_id, self.separator, self.end_call, self.end)
        return tuple(tag for tag in every if tag is not None)

    @property
    def openers(self) -> tuple[str, ...]:
        """Models leave out the token around all calls at times."""
        return tuple(tag for tag in (self.begin, self.call) if tag is not None)

    def block(self, opener: str, schemas: Schemas) -> SectionBlock:
        return SectionBlock(self, opener)


class SectionBlock(CallBlock):
    """Reads the calls of a `SectionCalls`. Their arguments are told as they are written, JSON or not."""

    def __init__(self, form: SectionCalls, opener: str) -> None:
        super().__init__()
        self._form = form
        self._call_tag = form.call or form.begin
        self._state = "head" if opener == self._call_tag else "between"
        self._written = opener  # what has not become a call
        self._head = ""
        self._id: str | None = None  # a part of the head, where `call_id` sets it off
        self._name: str | None = None  # once it is told
        self._arguments = ""  # what is not told of them

    def read(self, item: Item) -> tuple[list[CallPiece | str], list[Item]]:
        if isinstance(item, Tag):
            return self._pass(item) if item.spelling in self._form.tags else self.read(item.spelling)
        self._written += item
        if self._state == "head":
            if self._id is None:
                self._head += item
            else:
                self._id += item
        elif self._state == "arguments":
            self._arguments += item
            return self._grown(), []
        return [], []

    def finish(self) -> tuple[list[CallPiece | str], list[Item]]:
        pieces = self._end_call() if self._state == "arguments" else []
        return pieces + self._end(), []

    def _pass(self, tag: Tag) -> tuple[list[CallPiece | str], list[Item]]:
        form, spelling = self._form, tag.spelling
        if self._state == "arguments" and spelling in (form.separator, form.call_id):
            return self.read(spelling)  # no place for a tag, so it is text
        pieces = self._end_call() if self._state == "arguments" else []
        self._written += spelling
        if spelling == form.end:
            return pieces + self._end(), []
        if spelling == self._call_tag:
            self._state, self._head, self._id, self._name, self._arguments = "head", "", None, None, ""
        elif spelling == form.separator and self._state == "head":
            self._state = "arguments"
        elif spelling == form.call_id and self._state == "head":
            self._id = ""
        elif spelling == form.end_call:
            self._state = "between"
        return pieces, []

    def _grown(self) -> list[CallPiece | str]:
        """What can be told of the arguments."""
        if self._name is None and not self._begins(at_end=False):
            return []
        told = self._arguments.rstrip(_BEHIND)
        self._arguments = self._arguments[len(told) :]
        return self._tell(told)

    def _begins(self, *, at_end: bool) -> bool:
        """Find the name, and go to where the arguments begin."""
        head, arguments = self._head.strip(), self._arguments.lstrip()
        if not arguments and not at_end:
            return False
        if self._form.fences and head == "function" and not arguments.startswith("{"):
            found = _NAME_AND_FENCE.match(arguments)
            if found is None or not (at_end or arguments.startswith("{", found.end())):
                return False
            head, arguments = found.group(1), arguments[found.end() :]
        self._head = head
        self._arguments = arguments
        return bool(head)

    def _tell(self, arguments: str) -> list[CallPiece | str]:
        if self._name is not None:
            return [CallPiece(arguments)] if arguments else []
        if not arguments:
            return []
        numbered = _NUMBERED.fullmatch(self._head) if self._form.numbers else None
        self._name = numbered.group(1) if numbered else self._head.removeprefix("functions.")
        self.has_calls, self._written = True, ""
        return [
            CallPiece(arguments, self._name, self._head if numbered else (self._id or "").strip() or None)
        ]

    def _end_call(self) -> list[CallPiece | str]:
        """End the call at hand; one that says nothing has no arguments."""
        self._state = "between"
        if self._name is None and not self._begins(at_end=True):
            return []
        pieces = self._tell(self._arguments.rstrip(_BEHIND))
        if self._name is None:
            pieces = self._tell("{}")
        self._arguments, self._written = "", ""
        return pieces

    def _end(self) -> list[CallPiece | str]:
        return self._end_with(self._written, self._form.tags)
