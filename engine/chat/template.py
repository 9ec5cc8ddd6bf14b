"""Chats through the Jinja template that a checkpoint brings, with the conventions of `transformers`.

**What a request says stays text.** Special tokens come from the template; a message that spells one
must not make one. The template sees each string of a request with a mark (a private-use character
that occurs nowhere else) put inside every place where a special token is spelled, or where a piece
of one stands at the string's edge and could be completed by what the template writes next to it.
In the rendered prompt a special token is one only where no mark breaks it; the marks are then taken
out and everything else is encoded literally. Ordinary strings are handed over untouched, so that
templates can inspect and trim them. Roles are part of the markup, so only known ones are let in, and so
are the tags around the reasoning that an assistant's message begins with, which templates look for.
(A template that writes both `<` before and `>` after a string means to build markup from it, and may.)

**Bounds.** Templates run in Jinja's immutable sandbox: no attributes of Python objects, no changes
to what is passed in, ranges of at most 100,000. A prompt that grows beyond MAX_PROMPT_CHARS is cut
off with an error while it is rendered.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any

from engine.chat import taught_calls
from engine.chat.call_forms import schemas_of
from engine.chat.dialects import (
    HARMONY,
    HARMONY_CONTENT,
    HARMONY_REASONING,
    TAUGHT,
    Calls,
    calls_of,
    think_tags_of,
    writes_messages,
)
from engine.chat.format import ChatFormat, ChatPrompt
from engine.chat.harmony import END, ENDS, HarmonyParser
from engine.chat.marks import Marks
from engine.chat.output_parser import OutputParser, PlainParser, TaggedParser
from engine.chat.sandbox import ChatTemplate
from engine.chat.template_messages import MessageShaper, begun_answer
from engine.grammar.answer import AnswerStyle, Reasoning, answer_grammar
from engine.tokenizer.prompt import unused_character
from engine.tokenizer.tokenizer import OnBeginning, Tokenizer
from quant.errors import RequestError

MAX_PROMPT_CHARS = 16 << 20
RESERVED = {"messages", "tools", "documents", "add_generation_prompt"}
# What gpt-oss makes of the efforts that it does not know.
HARMONY_EFFORTS = {"none": "low", "minimal": "low", "xhigh": "high", "max": "high"}
SAID = "zqxsaid"  # an answer that no template writes by itself


class _TemplateError(RequestError):
    """The template fails on the messages."""


class TemplateChat(ChatFormat):
    """`ChatFormat` of a Jinja chat template. How answers write calls and reasoning is told from its text.

    for_tools   the template for requests with tools, where a checkpoint has one of its own for them

    Raises ConfigError where a template is not valid Jinja, or needs what there is not.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: str,
        now: Callable[[], datetime] = datetime.now,
        for_tools: str | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._template = ChatTemplate(template, now)
        self._for_tools = None if for_tools is None else TemplateChat(tokenizer, for_tools, now)
        self._marks = Marks(tokenizer.control_tokens(template))
        self._writes_messages = writes_messages(template)
        self._calls = None if self._writes_messages else calls_of(template)
        self._think = think_tags_of(template)
        self._messages = MessageShaper(template, self._think, self._says_the_same)

    def render(self, request: Mapping[str, Any], on_beginning: OnBeginning | None = None) -> ChatPrompt:
        if self._for_tools is not None and request.get("tools") and request.get("tool_choice") != "none":
            return self._for_tools.render(request, on_beginning)
        tools = self._tools(request)
        said = {
            "tools": tools if self._teaches_calls else None,
            "documents": request.get("documents"),
            **self._switches(request),
        }
        begun = begun_answer(request["messages"])
        prompt, special_ranges = self._told(said, request["messages"], tools, begun)
        reasoning = self._reasoning(prompt, special_ranges, begun)
        return ChatPrompt(
            self._tokenizer.encode_prompt(prompt, special_ranges, self._template.source, on_beginning),
            lambda: self._parser(reasoning, tools, begun),
            stop_token_ids=self._stop_token_ids,
            grammar=answer_grammar(
                request, self._tokenizer.added_tokens, self._style(reasoning, may_call=tools is not None)
            ),
            end_of_reasoning=END if self._writes_messages else (self._think or ("", ""))[1],
        )

    def _told(
        self,
        said: Mapping[str, Any],
        messages: Sequence[Mapping[str, Any]],
        tools: Any,
        begun: str | None,
    ) -> tuple[str, list[tuple[int, int]]]:
        """As `_written`; where the template has no place for tools, they stand in the messages."""
        tells_history = "tool_calls" not in self._template.source and taught_calls.needs_telling(messages)
        if self._teaches_calls or not (tools or tells_history):
            return self._written(said, messages, begun)
        errors: list[_TemplateError] = []
        for told in taught_calls.conversations(messages, tools):
            try:
                return self._written(said, told, begun)
            except _TemplateError as error:
                errors.append(error)
        raise errors[0]

    def _written(
        self, said: Mapping[str, Any], messages: Sequence[Mapping[str, Any]], begun: str | None
    ) -> tuple[str, list[tuple[int, int]]]:
        """The prompt and where its special tokens lie. Templates differ in what they make of messages."""
        errors: list[_TemplateError] = []
        for shaped in self._messages.shapes(messages, is_begun=begun is not None):
            try:
                return self._rendered({"messages": shaped, **said}, begun)
            except _TemplateError as error:
                errors.append(error)
        raise errors[0]

    def _rendered(self, said: Mapping[str, Any], begun: str | None) -> tuple[str, list[tuple[int, int]]]:
        text = json.dumps(said, ensure_ascii=False) + self._template.source
        mark = unused_character(text)
        variables = {name: self._marks.put(value, mark) for name, value in said.items()}
        variables |= self._tokenizer.special_tokens
        variables["add_generation_prompt"] = begun is None
        if begun is None:
            return self._marks.take_out(self._run(variables), mark)
        edge = unused_character(text + mark)
        # Between two edges nothing is trimmed; the first one is left out where templates look at beginnings.
        begun = variables["messages"][-1]["content"]
        between = f"{edge if begun[:1].isspace() else ''}{begun}{edge}"
        variables["messages"][-1]["content"] = between
        rendered = self._run(variables)
        end = rendered.rfind(between)
        if end < 0 or edge in rendered[end + len(between) :]:
            raise RequestError(
                "this model's chat template changes the last message, so it cannot be continued (prefix)",
                param="messages",
            )
        return self._marks.take_out(rendered[: end + len(between)].replace(edge, ""), mark)

    def _run(self, variables: Mapping[str, Any]) -> str:
        pieces, size = [], 0
        try:
            for piece in self._template.pieces(dict(variables)):
                size += len(piece)
                if size > MAX_PROMPT_CHARS:
                    break
                pieces.append(piece)
        except Exception as error:  # templates fail in any way that Python code can
            raise _TemplateError(self._template.complaint(error), param="messages") from None
        if size > MAX_PROMPT_CHARS:
            raise RequestError(
                f"the rendered prompt has more than {MAX_PROMPT_CHARS} characters; shorten the messages",
                param="messages",
            )
        return "".join(pieces)

    def _says_the_same(self, conversations: Sequence[Sequence[Mapping[str, Any]]]) -> bool:
        """Whether the template makes one prompt of these conversations."""
        try:
            prompts = {
                self._rendered({"messages": list(each), "tools": None}, None)[0] for each in conversations
            }
        except RequestError:
            return False
        return len(prompts) == 1

    @cached_property
    def _stop_token_ids(self) -> tuple[int, ...]:
        """The tokenizer's end, and the tokens that the template writes behind answers and calls."""
        tokens, eos = self._tokenizer.added_tokens, self._tokenizer.eos_token_id
        if self._writes_messages:
            ends = [tokens[end] for end in ENDS if end in tokens]
        else:
            behind = (self._token_behind({"content": SAID}), self._token_behind(_called()))
            ends = [tokens[token] for token in behind if token is not None]
        return tuple(dict.fromkeys([*([] if eos is None else [eos]), *ends]))

    def _token_behind(self, said: Mapping[str, Any]) -> str | None:
        """The special token that ends an assistant's turn, or begins the next one where nothing ends it."""
        is_call = "tool_calls" in said
        following = {"role": "tool", "content": "x", "tool_call_id": "zqxsaid00"} if is_call else None
        turns = [{"role": "user", "content": "x"}, {"role": "assistant", **said}]
        messages = [*turns, following or {"role": "user", "content": "x"}]
        try:
            prompt, special_ranges = self._written({"tools": None}, messages, None)
        except RequestError:
            return None
        end = prompt.rfind(SAID) + len(SAID)
        own = {*(self._calls.form.tags if self._calls else ()), *(self._think or ())}
        behind = next(((a, b) for a, b in special_ranges if a >= end and prompt[a:b] not in own), None)
        if behind is None or end < len(SAID) or (not is_call and prompt[end : behind[0]].strip()):
            return None
        return prompt[slice(*behind)]

    @cached_property
    def _teaches_calls(self) -> bool:
        """Whether the template has a place for tools, and teaches a spelling of calls that we read."""
        return "tools" in self._template.variables and (self._writes_messages or self._calls is not None)

    @property
    def _read_calls(self) -> Calls:
        """How answers write calls: as the template teaches it, or as we do."""
        return self._calls if self._teaches_calls and self._calls is not None else TAUGHT

    def _style(self, reasoning: Reasoning, *, may_call: bool) -> AnswerStyle:
        if self._writes_messages:
            spelling = HARMONY if may_call else None
            return AnswerStyle(reasoning, spelling, think=HARMONY_REASONING, content=HARMONY_CONTENT)
        think = self._think or ("", "")
        if not may_call:
            return AnswerStyle(reasoning, think=think)
        calls = self._read_calls
        return AnswerStyle(
            reasoning, calls.spelling, gap=calls.gap, think=think, binds_calls=not self._teaches_calls
        )

    def _reasoning(self, prompt: str, special_ranges: list[tuple[int, int]], begun: str | None) -> Reasoning:
        """How the answer goes on behind the prompt, which ends with what was `begun` of it."""
        if self._writes_messages:
            return Reasoning.MESSAGES if begun is None else Reasoning.NONE
        if self._think is None:
            return Reasoning.NONE
        think, end_think = self._think
        begun = begun or ""
        head = prompt[: len(prompt) - len(begun)].rstrip()
        last = next((prompt[a:b] for a, b in reversed(special_ranges) if b == len(head)), None)
        tokens = self._tokenizer.added_tokens

        def opens(tag: str) -> bool:
            return last == tag if tag in tokens else head.endswith(tag)

        is_open = opens(think) or begun.lstrip().startswith(think)
        if is_open and end_think not in begun:
            return Reasoning.OPEN
        return Reasoning.NONE if is_open or opens(end_think) or begun.strip() else Reasoning.POSSIBLE

    def _parser(self, reasoning: Reasoning, tools: Any, begun: str | None) -> OutputParser:
        tokens = self._tokenizer.added_tokens
        if self._writes_messages:
            return HarmonyParser(tools=tools is not None, tokens=tokens, in_final=begun is not None)
        form = None if tools is None else self._read_calls.form
        if reasoning is Reasoning.NONE and form is None:
            return PlainParser()
        return TaggedParser(
            reasoning=reasoning is not Reasoning.NONE,
            in_reasoning=reasoning is Reasoning.OPEN,
            calls=form,
            schemas=schemas_of(tools),
            tokens=tokens,
            think=self._think or ("", ""),
        )

    def _tools(self, request: Mapping[str, Any]) -> Any:
        return None if request.get("tool_choice") == "none" else request.get("tools") or None

    def _switches(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Variables beside the messages: `chat_template_kwargs`, and reasoning switched on or off."""
        switches = dict(request.get("chat_template_kwargs") or {})
        if reserved := switches.keys() & RESERVED:
            raise RequestError(
                f"chat_template_kwargs must not set {', '.join(sorted(reserved))}",
                param="chat_template_kwargs",
            )
        effort = request.get("reasoning_effort")
        if effort is not None:
            known = HARMONY_EFFORTS.get(effort, effort) if self._writes_messages else effort
            switches.setdefault("reasoning_effort", known)
        thinking = (request.get("thinking") or {}).get("type")
        if effort == "none" or thinking == "disabled":
            switches = {"enable_thinking": False, "thinking": False} | switches
        elif thinking == "enabled":
            switches = {"enable_thinking": True, "thinking": True} | switches
        return switches


def _called() -> dict[str, Any]:
    """An assistant's message with a call."""
    function = {"name": "f", "arguments": json.dumps({"a": SAID})}
    return {"content": None, "tool_calls": [{"id": "zqxsaid00", "type": "function", "function": function}]}
