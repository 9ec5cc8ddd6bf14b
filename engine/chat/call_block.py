"""What stands behind a `<tool_call>`: one call as a rule, several at times, or text that is none."""

from __future__ import annotations

import re
from dataclasses import dataclass

from engine.chat.call_reader import CallReader
from engine.chat.tags import Item, Tag

TOOL_CALL, END_TOOL_CALL = "<tool_call>", "</tool_call>"
# What may stand around calls that share a pair of tags: before the first one, and later.
_BEFORE_CALLS, _BETWEEN_CALLS = re.compile(r"[\s\[]*"), re.compile(r"[\s,\[\]}]*")


@dataclass(frozen=True)
class CallPiece:
    """A piece of a call's arguments; the name comes with the first one."""

    arguments: str
    name: str | None = None


class CallBlock:
    """Reads items until the tag that ends the block.

    A call is told as it is written, once its name is known and something of its arguments; what is no
    call, and what a call has no place for, comes back as text. A tag inside a string is text if the
    string then goes on as JSON does.

    has_ended   the tag that ends it has been read
    has_calls   a call was in it
    """

    def __init__(self) -> None:
        self.has_ended = False
        self.has_calls = False
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
        if item.spelling not in (TOOL_CALL, END_TOOL_CALL):
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
            return [], self._seek(text)
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
        return pieces, [text[count:]] if count < len(text) else []

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
        if text:
            self._is_prose = True
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
        begins_next = tag is not None and tag.spelling == TOOL_CALL
        pieces: list[CallPiece | str] = []
        if self._reader is not None:
            pieces += self._new_pieces() + self._end_object()
        text = self._text.strip()
        if tag is None and END_TOOL_CALL.startswith(text):
            text = ""  # cut off within the tag
        if not self.has_calls:
            text = TOOL_CALL + self._text + (tag.spelling if tag is not None and not begins_next else "")
        self.has_ended = True
        return [*pieces, *([text] if text else [])], [tag] if tag is not None and begins_next else []

    def _end_at_doubt(self) -> tuple[list[CallPiece | str], list[Item]]:
        """End with the tag inside a string, which did end the call."""
        tag, *behind = self._behind_doubt
        assert isinstance(tag, Tag)
        pieces, rest = self._end(tag)
        return pieces, rest + behind
