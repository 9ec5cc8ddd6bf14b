"""gpt-oss' answers ("harmony"): messages with a header each, which names a channel and perhaps a recipient.

    <|channel|>analysis<|message|>REASONING<|end|>
    <|start|>assistant<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>ARGUMENTS<|call|>
    <|start|>assistant<|channel|>final<|message|>TEXT<|return|>

The prompt ends with `<|start|>assistant`, so an answer begins inside a header. `<|return|>` and `<|call|>`
end it, `<|end|>` only ends a message. What is written in the commentary to nobody is for the user to read.

OpenAI's library for this format takes its vocabulary from the network when it starts, so it is not used.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence

from engine.chat.output_parser import MessageDelta, TagParser
from engine.chat.tags import Item, Tag

START, CHANNEL, CONSTRAIN, MESSAGE = "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>"
END, CALL, RETURN = "<|end|>", "<|call|>", "<|return|>"
TAGS = (START, CHANNEL, CONSTRAIN, MESSAGE, END, CALL, RETURN)
ENDS = (RETURN, CALL)  # of an answer

_RECIPIENT = re.compile(r"\bto=([^\s<]+)")
_ROLE = re.compile(r"(assistant)?\s*(to=\S*)?")  # what may stand before a channel


def ends_of(named: Sequence[int], added_tokens: Mapping[str, int]) -> tuple[int, ...]:
    """The tokens that end an answer, of which `named` are what a checkpoint names.

    A vocabulary with harmony's tokens has two ends, and files name one of them, or what only ends a message.
    """
    if not all(tag in added_tokens for tag in TAGS):
        return tuple(named)
    kept = (i for i in named if i != added_tokens[END])
    return tuple(dict.fromkeys([*kept, *(added_tokens[end] for end in ENDS)]))


class HarmonyParser(TagParser):
    """Reads harmony's messages.

    tools       calls of tools are looked for; else what is written to them is text
    tokens      spellings of the vocabulary's added tokens: a tag among them is that token
    in_final    the prompt has begun the text of the answer

    Two messages of one kind are told with an empty line between them.
    """

    def __init__(self, *, tools: bool, tokens: Collection[str] = (), in_final: bool = False) -> None:
        super().__init__(TAGS, tokens)
        self._tools = tools
        self._state = "content" if in_final else "header"
        self._header = ""
        self._has_channel = False
        self._told: set[str] = set()  # kinds of messages that have been told
        self._is_new = False  # nothing of the message at hand has been told
        self._name = ""  # of the call at hand
        self._held = ""  # white space at the end of its arguments

    def finish(self) -> list[MessageDelta]:
        return self._read(self._finder.finish()) + self._end_message()

    def _read(self, items: Iterable[Item]) -> list[MessageDelta]:
        deltas: list[MessageDelta] = []
        for item in items:
            deltas += self._pass(item.spelling) if isinstance(item, Tag) else self._say(item)
        return deltas

    def _pass(self, tag: str) -> list[MessageDelta]:
        if tag == START:
            deltas = self._end_message()
            self._begin_header()
            return deltas
        if tag in (END, *ENDS):
            return self._end_message()
        if tag == MESSAGE and self._state == "header":
            self._begin_message()
            return []
        if self._state == "between" and tag == CHANNEL:
            self._begin_header()  # a model may leave out `<|start|>assistant`
        if self._state == "header":
            self._header += tag
            self._has_channel |= tag == CHANNEL
            return []
        return self._say(tag)  # no place for a tag, so it is text

    def _begin_header(self) -> None:
        self._state, self._header, self._has_channel = "header", "", False

    def _begin_message(self) -> None:
        """Go by the header: reasoning, text, or a call, whose name is told with its first arguments."""
        recipient = _RECIPIENT.search(self._header)
        channel = self._header.partition(CHANNEL)[2].split(" ")[0].partition("<")[0].strip()
        to = recipient.group(1) if recipient else ""
        self._name = to.removeprefix("functions.")
        self._is_new = True
        if self._tools and self._name and (to.startswith("functions.") or channel != "analysis"):
            self._state, self._held = "call", ""
        else:
            self._state = "reasoning" if channel == "analysis" else "content"

    def _say(self, text: str) -> list[MessageDelta]:
        match self._state:
            case "header":
                self._header += text
                return []
            case "call":
                text = (self._held + text).lstrip() if self._is_new else self._held + text
                certain = text.rstrip()
                self._held = text[len(certain) :]
                return self._arguments(certain)
            case "between":
                text = text.lstrip()
                if not text:
                    return []
                self._state, self._is_new = "content", True
        gap = "\n\n" if self._is_new and self._state in self._told else ""
        self._told.add(self._state)
        self._is_new = False
        text = gap + text
        return [MessageDelta(reasoning=text) if self._state == "reasoning" else MessageDelta(content=text)]

    def _arguments(self, text: str) -> list[MessageDelta]:
        if not text:
            return []
        name = self._name if self._is_new else None
        self._is_new = False
        return [self._call(text, name)]

    def _end_message(self) -> list[MessageDelta]:
        deltas = self._arguments("{}") if self._state == "call" and self._is_new else []
        if self._state == "header" and not self._has_channel and not _ROLE.fullmatch(self._header.strip()):
            self._state = "between"  # the model does not keep to the format, and what it says is text
            deltas = self._say(self._header)
        self._state = "between"
        return deltas
