"""A conversation as chat templates read it, in the shapes that `transformers` gives it.

Templates differ in what they make of calls' arguments, of absent content and of lists of parts; a template
that fails on one shape is given the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import blake2b
from typing import Any

from engine.chat.call_history import ArgumentsForm, tool_call
from engine.chat.marks import WithReasoning
from quant.errors import RequestError

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
TEXTS = ("text", "input_text", "refusal")  # types of parts that are text
SHORT_ID = 9  # the length that Mistral's templates ask of ids
BASE = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"

Messages = list[dict[str, Any]]
SaysTheSame = Callable[[Sequence[Sequence[Mapping[str, Any]]]], bool]


class MessageShaper:
    """Shapes messages for one template.

    template        its Jinja source
    think           the tags around reasoning, where the template has some
    says_the_same   whether the template makes one prompt of several conversations
    """

    def __init__(self, template: str, think: tuple[str, str] | None, says_the_same: SaysTheSame) -> None:
        self._think = think
        self._knows_developer = "developer" in template
        self._wants_short_ids = f"length != {SHORT_ID}" in template
        self._says_the_same = says_the_same
        self._reads_parts: dict[str, bool] = {}  # by role

    def shapes(self, messages: Sequence[Mapping[str, Any]], *, is_begun: bool) -> Iterator[Messages]:
        """The messages in the shapes that templates expect, the likeliest first. Where the last one
        `is_begun`, its content is a string.

        Raises RequestError for a role that there is not, and for content that is no text.
        """
        has_calls = any(message.get("tool_calls") for message in messages)
        plain = [self._plain(message) for message in messages]
        if is_begun:
            plain[-1]["content"] = text_of(messages[-1].get("content"))
        for is_lenient in (False, True):
            if is_lenient and not any(_absent(message) or _reasoning(message) for message in messages):
                return
            for form in ArgumentsForm if has_calls else [ArgumentsForm.AS_WRITTEN]:
                yield [self._shaped(message, form, is_lenient) for message in plain]

    def _plain(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """The message with a role that the template knows, and its content as text or parts."""
        role = message.get("role")
        if role not in ROLES:
            raise RequestError(f"role must be one of {', '.join(ROLES)}, got {role!r}", param="messages")
        if role == "developer" and not self._knows_developer:
            role = "system"
        content = message.get("content")
        text = text_of(content)
        plain = {**message, "role": role, "content": None if _absent(message) else text}
        if role == "assistant" and self._think is not None and not _absent(message):
            plain["content"] = WithReasoning.found_in(text, self._think)
        if isinstance(content, list) and len(content) > 1 and self._takes_parts(role):
            plain["content"] = [{"type": "text", "text": part["text"]} for part in content]
        return plain

    def _shaped(self, message: Mapping[str, Any], form: ArgumentsForm, is_lenient: bool) -> dict[str, Any]:
        """As transformers does, unless lenient: no key for absent content, and reasoning by two names."""
        reasoning = _reasoning(message)
        shaped = {**message}
        if reasoning is not None and not is_lenient:
            shaped = {"thinking": reasoning, **shaped, "reasoning_content": reasoning}
        if shaped["content"] is None:
            if is_lenient:
                shaped["content"] = ""
            else:
                del shaped["content"]
        if shaped.get("tool_calls"):
            shaped["tool_calls"] = [
                self._with_id(tool_call(call, form), "id") for call in shaped["tool_calls"]
            ]
        return self._with_id(shaped, "tool_call_id")

    def _with_id(self, described: dict[str, Any], key: str) -> dict[str, Any]:
        if self._wants_short_ids and isinstance(described.get(key), str):
            described[key] = short_id(described[key])
        return described

    def _takes_parts(self, role: str) -> bool:
        """Whether the template joins parts itself. It is asked once, with one part in place of a text."""
        if role not in self._reads_parts:
            self._reads_parts[role] = role in ("system", "developer", "user", "assistant") and (
                self._says_the_same([_saying(role, "zq"), _saying(role, [{"type": "text", "text": "zq"}])])
            )
        return self._reads_parts[role]


def begun_answer(messages: Sequence[Mapping[str, Any]]) -> str | None:
    """Text of the answer that the last message has begun (`prefix`), which the model is to go on with."""
    last = messages[-1] if messages else {}
    if last.get("role") != "assistant" or not last.get("prefix"):
        return None
    if last.get("tool_calls"):
        raise RequestError("a message with tool_calls is complete and cannot be continued", param="messages")
    return text_of(last.get("content"))


def text_of(content: Any) -> str:
    """Text of a message: a string, nothing, or a list of text parts (joined by a line break)."""
    if content is None or isinstance(content, str):
        return content or ""
    texts = [part.get("text") for part in content if part.get("type") in TEXTS]
    if len(texts) != len(content) or not all(isinstance(text, str) for text in texts):
        raise RequestError("this model reads text only; send content parts of type text", param="messages")
    return "\n".join(texts)


def short_id(call_id: str) -> str:
    """A call's id in nine letters and digits; the same one each time, and itself where it is one."""
    if len(call_id) == SHORT_ID and call_id.isascii() and call_id.isalnum():
        return call_id
    number = int.from_bytes(blake2b(call_id.encode(errors="replace"), digest_size=8).digest(), "big")
    return "".join(BASE[number // len(BASE) ** place % len(BASE)] for place in range(SHORT_ID))


def _absent(message: Mapping[str, Any]) -> bool:
    return message.get("content") is None and bool(message.get("tool_calls"))


def _reasoning(message: Mapping[str, Any]) -> Any:
    names = ("reasoning_content", "thinking", "reasoning")
    return next((message[name] for name in names if message.get(name) is not None), None)


def _saying(role: str, content: Any) -> Messages:
    """A conversation in which `role` says `content`."""
    said = {"role": role, "content": content}
    if role == "user":
        return [said]
    asked = {"role": "user", "content": "x"}
    return [asked, said, asked] if role == "assistant" else [said, asked]
