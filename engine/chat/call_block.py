"""Calls as JSON objects of name and arguments: Hermes' and Qwen's `<tool_call>`, the lists of Mistral and
Granite, and Llama's bare objects. One call as a rule, several at times, or text that is none."""

from __future__ import annotations

import re
from dataclasses import dataclass

from engine.chat.call_forms import CallBlock, CallForm, CallPiece, Schemas
from engine.chat.call_reader import ARGUMENTS, LABELS, CallReader
from engine.chat.tags import Item, Tag

TOOL_CALL, END_TOOL_CALL = "<tool_call>", "</tool_call>"
# What may stand around calls that share a pair of tags: before the first one, and later.
_BEFORE_CALLS, _BETWEEN_CALLS = re.compile(r"[\s\[]*"), re.compile(r"[\s,;\[\]}]*")
_MEMBERS = {"name", "function", *ARGUMENTS, *LABELS}


@dataclass(frozen=True)
class JsonCalls(CallForm):
    """`begin {"name": NAME, "arguments": {...}} end`; without an `end`, calls go on to the answer's end."""

    begin: str = TOOL_CALL
    end: str | None = END_TOOL_CALL
    is_bare: bool = False

    @property
    def tags(self) -> tuple[str, ...]:
        return (self.begin,) if self.end is None else (self.begin, self.end)

    @property
    def openers(self) -> tuple[str, ...]:
        return (self.begin,)

    def block(self, opener: str, schemas: Schemas) -> JsonBlock:
        return JsonBlock(opener, self.begin, self.end)


class JsonBlock(CallBlock):
    """Reads items until the tag that ends the block.

    A call is told once its name is known and something of its arguments. A tag inside a string is text if the
    string then goes on as JSON does. Without a tag that ends it, the block ends with what is no call.
    """

    def __init__(
        self, opener: str = TOOL_CALL, begin: str = TOOL_CALL, end: str | None = END_TOOL_CALL
    ) -> None:
        super().__init__()
        self._opener = opener
        self._begin_tag = begin
        self._end_tag = end
        self._text = ""  # what is no part of a call
        self._is_prose = False
        self._reader: CallReader | None = None
        self._start: int | None = None  # of the arguments, once their call is being told
        self._told = 0
        self._behind_doubt: list[Item] = []  # a tag inside a string, and what follows it

    def read(self, item: Item) -> tuple[list[CallPiece | str], list[Item]]:
        """What `item` makes certain, and what is to be read next in its place."""
        if isinstance(item, str):
            return self._read_text(item)
        if item.spelling not in (self._begin_tag, self._end_tag):
            return self._read_text(item.spelling)
        reader = self._reader
        if reader is not None and reader.in_string and not reader.is_broken:
            self._behind_doubt.append(item)
            reader.take_doubtful(item.spelling)
            return [], []
        return self._end(item)

    def finish(self) -> tuple[list[CallPiece | str], list[Item]]:
        """The same at the end of the answer."""
        if self._behind_doubt and self._reader is not None:
            self._reader.overrun()
            return self._end_at_doubt()
        return self._end(None)

    def _read_text(self, text: str) -> tuple[list[CallPiece | str], list[Item]]:
        if self._reader is None:
            found = self._seek(text)
            is_over = self._is_prose and self._end_tag is None
            return self._end(None)[0] if is_over else [], found
        count = self._reader.take(text)
        if self._behind_doubt:
            self._behind_doubt.append(text)
        if self._reader.was_overrun:
            return self._end_at_doubt()
        if self._reader.doubt is None:
            self._behind_doubt = []
        pieces = self._new_pieces()
        if self._reader.has_ended:
            pieces += self._end_object()
        rest: list[Item] = [text[count:]] if count < len(text) else []
        if self._end_tag is None and (self._is_prose or self._cannot_be_call):
            pieces += self._end(None)[0]
        return pieces, rest

    @property
    def _cannot_be_call(self) -> bool:
        """Whether what is being read begins like no call."""
        reader = self._reader
        if reader is None or self._start is not None:
            return False
        return reader.is_broken or (reader.first_key is not None and reader.first_key not in _MEMBERS)

    def _seek(self, text: str) -> list[Item]:
        """Go to where a call begins in `text`; what is to be read from there."""
        if not self._is_prose:
            found = (_BETWEEN_CALLS if self.has_calls else _BEFORE_CALLS).match(text)
            assert found is not None
            self._text += "" if self.has_calls else found.group()
            text = text[found.end() :]
            if text.startswith("{"):
                self._reader, self._start = CallReader(), None
                return [text]
        if not text:
            return []
        self._is_prose = True
        if self._end_tag is None:
            return [text]
        self._text += text
        return []

    def _new_pieces(self) -> list[CallPiece | str]:
        reader = self._reader
        assert reader is not None
        name = None
        if self._start is None and reader.doubt is None and (name := reader.name) is not None:
            self._start = reader.arguments_start
            if self._start is not None:
                self._told = self._start
                self._found_call()
        if self._start is None:
            return []
        ends = (reader.arguments_end(self._start), reader.doubt, len(reader.text))
        end = min(end for end in ends if end is not None)
        arguments = reader.text[self._told : end]
        self._told = max(self._told, end)
        return [CallPiece(arguments, name)] if arguments else []

    def _found_call(self) -> None:
        if not self.has_calls:
            self.has_calls, self._text = True, ""

    def _end_object(self) -> list[CallPiece | str]:
        reader, self._reader = self._reader, None
        assert reader is not None
        if self._start is not None:
            self._text += reader.others(self._start)
            return []
        call = reader.whole()
        if call is None:
            self._text += reader.text
            self._is_prose = True
            return []
        self._found_call()
        self._text += call.others
        return [CallPiece(call.arguments, call.name)]

    def _end(self, tag: Tag | None) -> tuple[list[CallPiece | str], list[Item]]:
        """End with `tag`, or with the answer. A tag that begins the next call is left to be read."""
        begins_next = tag is not None and tag.spelling == self._begin_tag
        pieces: list[CallPiece | str] = []
        if self._reader is not None:
            pieces += self._new_pieces() + self._end_object()
        text = self._text
        if self._end_tag is not None:
            text = text.strip()
            if tag is None and self._end_tag.startswith(text):
                text = ""  # cut off within the tag
        if not self.has_calls:
            text = self._opener + self._text + (tag.spelling if tag is not None and not begins_next else "")
        self.has_ended = True
        return [*pieces, *([text] if text else [])], [tag] if tag is not None and begins_next else []

    def _end_at_doubt(self) -> tuple[list[CallPiece | str], list[Item]]:
        """End with the tag inside a string, which did end the call."""
        tag, *behind = self._behind_doubt
        assert isinstance(tag, Tag)
        pieces, rest = self._end(tag)
        return pieces, rest + behind
