"""Chats through the Jinja template that a checkpoint brings, with the conventions of `transformers`.

**What a request says stays text.** Special tokens come from the template; a message that spells one
must not make one. The template sees each string of a request with a mark (a private-use character
that occurs nowhere else) put inside every place where a special token is spelled, or where a piece
of one stands at the string's edge and could be completed by what the template writes next to it.
In the rendered prompt a special token is one only where no mark breaks it; the marks are then taken
out and everything else is encoded literally. Ordinary strings are handed over untouched, so that
templates can inspect and trim them. Roles are part of the markup, so only known ones are let in.
(A template that writes both `<` before and `>` after a string means to build markup from it, and may.)

**Bounds.** Templates run in Jinja's immutable sandbox: no attributes of Python objects, no changes
to what is passed in, ranges of at most 100,000. A prompt that grows beyond MAX_PROMPT_CHARS is cut
off with an error while it is rendered.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from engine.chat.call_block import TOOL_CALL
from engine.chat.call_history import ArgumentsForm, WrittenArguments, tool_call
from engine.chat.format import ChatFormat, ChatPrompt
from engine.chat.output_parser import END_THINK, THINK, OutputParser, PlainParser, TaggedParser
from engine.grammar.answer import AnswerStyle, Reasoning, answer_grammar
from engine.grammar.tools import TaggedCalls
from engine.tokenizer.prompt import pattern_of, unused_character
from engine.tokenizer.tokenizer import Tokenizer
from quant.errors import ConfigError, RequestError

MAX_PROMPT_CHARS = 16 << 20
ROLES = ("system", "developer", "user", "assistant", "tool", "function")


class _TemplateError(RequestError):
    """The template fails on the messages."""


class TemplateChat(ChatFormat):
    """`ChatFormat` of a Jinja chat template.

    Raises ConfigError where the template is not valid Jinja.
    """

    def __init__(
        self, tokenizer: Tokenizer, template: str, now: Callable[[], datetime] = datetime.now
    ) -> None:
        self._tokenizer = tokenizer
        self._source = template
        environment = _environment(now)
        try:
            self._template = environment.from_string(template)
            self._variables = meta.find_undeclared_variables(environment.parse(template))
        except jinja2.TemplateError as error:
            raise ConfigError(f"the model's chat template is not valid Jinja: {error}") from None
        self._marks = _Marks(tokenizer.control_tokens(template))
        eos = tokenizer.eos_token_id
        self._stop_token_ids = () if eos is None else (eos,)

    def render(self, request: Mapping[str, Any]) -> ChatPrompt:
        tools = self._tools(request)
        said = {
            "tools": tools,
            "documents": request.get("documents"),
            **self._switches(request),
        }
        begun = _begun_answer(request["messages"])
        prompt, special_ranges = self._written(said, request["messages"], begun)
        reasoning = self._reasoning(prompt, special_ranges, begun)
        calls = tools is not None and self._can_call
        style = AnswerStyle(reasoning, TaggedCalls() if calls else None)
        return ChatPrompt(
            self._tokenizer.encode_prompt(prompt, special_ranges, self._source),
            lambda: self._parser(reasoning, calls),
            stop_token_ids=self._stop_token_ids,
            grammar=answer_grammar(request, self._tokenizer.added_tokens, style),
        )

    def _written(
        self, said: Mapping[str, Any], messages: list[Mapping[str, Any]], begun: str | None
    ) -> tuple[str, list[tuple[int, int]]]:
        """The prompt and where its special tokens lie. Templates differ in how they read calls' arguments."""
        has_calls = any(message.get("tool_calls") for message in messages)
        errors: list[_TemplateError] = []
        for form in ArgumentsForm if has_calls else [ArgumentsForm.AS_WRITTEN]:
            told = {"messages": [self._message(message, form) for message in messages], **said}
            try:
                return self._rendered(told, begun)
            except _TemplateError as error:
                errors.append(error)
        raise errors[0]

    def _rendered(self, said: Mapping[str, Any], begun: str | None) -> tuple[str, list[tuple[int, int]]]:
        text = json.dumps(said, ensure_ascii=False) + self._source
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
            for piece in self._template.generate(**variables):
                size += len(piece)
                if size > MAX_PROMPT_CHARS:
                    break
                pieces.append(piece)
        except Exception as error:  # templates fail in any way that Python code can
            raise _TemplateError(
                f"the model's chat template rejects these messages: {error}", param="messages"
            ) from None
        if size > MAX_PROMPT_CHARS:
            raise RequestError(
                f"the rendered prompt has more than {MAX_PROMPT_CHARS} characters; shorten the messages",
                param="messages",
            )
        return "".join(pieces)

    @property
    def _can_call(self) -> bool:
        """Whether the template teaches the spelling of tool calls that we read."""
        return TOOL_CALL in self._source

    def _reasoning(self, prompt: str, special_ranges: list[tuple[int, int]], begun: str | None) -> Reasoning:
        """How the answer goes on behind the prompt, which ends with what was `begun` of it."""
        if END_THINK not in self._source:
            return Reasoning.NONE
        begun = begun or ""
        head = prompt[: len(prompt) - len(begun)].rstrip()
        last = next((prompt[a:b] for a, b in reversed(special_ranges) if b == len(head)), None)
        tokens = self._tokenizer.added_tokens

        def opens(tag: str) -> bool:
            return last == tag if tag in tokens else head.endswith(tag)

        is_open = opens(THINK) or begun.lstrip().startswith(THINK)
        if is_open and END_THINK not in begun:
            return Reasoning.OPEN
        return Reasoning.NONE if is_open or opens(END_THINK) or begun.strip() else Reasoning.POSSIBLE

    def _parser(self, reasoning: Reasoning, calls: bool) -> OutputParser:
        if reasoning is Reasoning.NONE and not calls:
            return PlainParser()
        return TaggedParser(
            reasoning=reasoning is not Reasoning.NONE,
            in_reasoning=reasoning is Reasoning.OPEN,
            tools=calls,
            tokens=self._tokenizer.added_tokens,
        )

    def _tools(self, request: Mapping[str, Any]) -> Any:
        choice = request.get("tool_choice")
        tools = request.get("tools") or None
        if choice == "none" or tools is None:
            return None
        if choice not in (None, "auto") and not self._can_call:
            raise RequestError(
                "tool_choice must be auto or none for this model: its tool call format is unknown",
                param="tool_choice",
            )
        if "tools" not in self._variables:
            raise RequestError("this model's chat template does not support tools", param="tools")
        return tools

    def _message(self, message: Mapping[str, Any], form: ArgumentsForm) -> dict[str, Any]:
        """A message as templates expect it: content a string, calls' arguments in one of their forms."""
        role = message.get("role")
        if role not in ROLES:
            raise RequestError(f"role must be one of {', '.join(ROLES)}, got {role!r}", param="messages")
        if role == "developer" and "developer" not in self._source:
            role = "system"
        shaped = {**message, "role": role, "content": _content(message.get("content"))}
        if message.get("tool_calls"):
            shaped["tool_calls"] = [tool_call(call, form) for call in message["tool_calls"]]
        return shaped

    def _switches(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Variables beside the messages: `chat_template_kwargs`, and reasoning switched on or off."""
        switches = dict(request.get("chat_template_kwargs") or {})
        reserved = switches.keys() & {"messages", "tools", "documents", "add_generation_prompt"}
        if reserved:
            raise RequestError(
                f"chat_template_kwargs must not set {', '.join(sorted(reserved))}",
                param="chat_template_kwargs",
            )
        effort = request.get("reasoning_effort")
        if effort is not None:
            switches.setdefault("reasoning_effort", effort)
        thinking = (request.get("thinking") or {}).get("type")
        if effort == "none" or thinking == "disabled":
            switches = {"enable_thinking": False, "thinking": False} | switches
        elif thinking == "enabled":
            switches = {"enable_thinking": True, "thinking": True} | switches
        return switches


class _Marks:
    """Puts marks into what a request says, and takes them out of what the template made of it.

    A control token of one character cannot be broken by a mark inside: it gets two in front.
    """

    def __init__(self, control_tokens: Iterable[str]) -> None:
        tokens = list(control_tokens)
        self._single = {token for token in tokens if len(token) == 1}
        pattern = pattern_of(tokens)
        self._token = re.compile(pattern)
        self._token_start = re.compile(f"(?=({pattern}))(.)", re.DOTALL)
        self._beginnings = {token[:n] for token in tokens for n in range(1, len(token))}
        self._endings = {token[-n:] for token in tokens for n in range(1, len(token))}
        self._longest = max(map(len, tokens), default=0)

    def put(self, value: Any, mark: str) -> Any:
        """`value` with its strings marked; roles are left alone, they were checked."""
        if isinstance(value, str):
            marked = self._marked(value, mark)
            return WrittenArguments(marked) if isinstance(value, WrittenArguments) else marked
        if isinstance(value, Mapping):
            return {
                self._break(key, mark): item if key == "role" else self.put(item, mark)
                for key, item in value.items()
            }
        if isinstance(value, list | tuple):
            return [self.put(item, mark) for item in value]
        return value

    def take_out(self, rendered: str, mark: str) -> tuple[str, list[tuple[int, int]]]:
        """The prompt without marks, and the `[start, end)` ranges of its special tokens."""
        parts: list[str] = []
        ranges: list[tuple[int, int]] = []
        done = size = 0
        for match in self._token.finditer(rendered):
            if match.group() in self._single and rendered.endswith(mark * 2, 0, match.start()):
                continue
            plain = rendered[done : match.start()].replace(mark, "")
            parts += [plain, match.group()]
            size += len(plain)
            ranges.append((size, size + len(match.group())))
            size, done = ranges[-1][1], match.end()
        parts.append(rendered[done:].replace(mark, ""))
        return "".join(parts), ranges

    def _break(self, text: str, mark: str) -> str:
        """A mark after the first character of every special token that is spelled in `text`."""

        def broken(match: re.Match[str]) -> str:
            front = mark * 2 if match.group(2) in self._single else ""
            return front + match.group(2) + (mark if len(match.group(1)) > 1 else "")

        return self._token_start.sub(broken, text)

    def _marked(self, text: str, mark: str) -> str:
        text = self._break(text, mark)
        # The template may trim, so the edges are those of the trimmed text.
        head, tail = text.lstrip(), text.rstrip()
        lengths = range(1, self._longest)
        if any(tail[-n:] in self._beginnings for n in lengths):
            text = tail + mark + text[len(tail) :]
        if any(head[:n] in self._endings for n in lengths):
            text = text[: len(text) - len(text.lstrip())] + mark + text.lstrip()
        return text


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}`, which marks assistant text for training: just its body."""

    tags = {"generation"}  # noqa: RUF012  # as the base class has it

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment(now: Callable[[], datetime]) -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda layout: now().strftime(layout)
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as models saw it in training: no HTML escapes, which Jinja's own filter makes."""
    if isinstance(value, WrittenArguments):
        return str(value)
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _begun_answer(messages: list[Mapping[str, Any]]) -> str | None:
    """Text of the answer that the last message has begun (`prefix`), which the model is to go on with."""
    last = messages[-1] if messages else {}
    if last.get("role") != "assistant" or not last.get("prefix"):
        return None
    if last.get("tool_calls"):
        raise RequestError("a message with tool_calls is complete and cannot be continued", param="messages")
    return _content(last.get("content"))


def _content(content: Any) -> str:
    """Text of a message: a string, nothing, or a list of text parts (joined by a line break)."""
    if content is None or isinstance(content, str):
        return content or ""
    texts = [part.get("text") for part in content if part.get("type") in ("text", "input_text", "refusal")]
    if len(texts) != len(content) or not all(isinstance(text, str) for text in texts):
        raise RequestError("this model reads text only; send content parts of type text", param="messages")
    return "\n".join(texts)
