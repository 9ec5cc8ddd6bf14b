"""What the spellings of tool calls have in common: a form says which tags it is made of, and reads a block of
calls as it is written."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from engine.chat.tags import Item

# The schema of each tool's arguments, by the tool's name.
Schemas = Mapping[str, Any]


@dataclass(frozen=True)
class CallPiece:
    """A piece of a call's arguments; the first one has the name, and the model's own id if it wrote one."""

    arguments: str
    name: str | None = None
    id: str | None = None


class CallBlock(ABC):
    """Reads items from the tag that opens a block of calls until its end.

    A call is told as it is written; what is no call, and what a call has no place for, comes back as text.

    has_ended   the block's end has been read
    has_calls   a call was in it
    """

    def __init__(self) -> None:
        self.has_ended = False
        self.has_calls = False

    @abstractmethod
    def read(self, item: Item) -> tuple[list[CallPiece | str], list[Item]]:
        """What `item` makes certain, and what is to be read next in its place."""

    @abstractmethod
    def finish(self) -> tuple[list[CallPiece | str], list[Item]]:
        """The same at the end of the answer."""

    def _end_with(self, text: str, tags: Iterable[str]) -> list[CallPiece | str]:
        """End the block, of which `text` is no call; without its `tags` where there were calls."""
        self.has_ended = True
        if self.has_calls:
            for tag in tags:
                text = text.replace(tag, "")
            text = text.strip()
        return [text] if text else []


class CallForm(ABC):
    """How a model writes calls.

    is_bare     a call may also be all of the answer, with no tag before it
    ends_reasoning  a call may begin while the model reasons, which ends the reasoning
    """

    is_bare: bool = False
    ends_reasoning: bool = False

    @property
    @abstractmethod
    def tags(self) -> tuple[str, ...]:
        """Spellings that are looked for in its answers, of which none begins inside another."""

    @property
    @abstractmethod
    def openers(self) -> tuple[str, ...]:
        """Those that open a block of calls."""

    @abstractmethod
    def block(self, opener: str, schemas: Schemas) -> CallBlock:
        """A reader of the block that `opener` has opened (empty: the answer's own beginning)."""


def schemas_of(tools: Any) -> dict[str, Any]:
    """The schemas of OpenAI's `tools`."""
    return {tool["function"]["name"]: tool["function"].get("parameters") for tool in tools or ()}
