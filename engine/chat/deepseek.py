"""Chats with DeepSeek V4 and V4.1, through the vendor's own library `deepseek-recipe`.

The library turns a Chat Completions body into a conversation, renders it and says which ranges of
the prompt are special tokens, and takes generated text apart into reasoning, content and tool
calls. As in the vendor's API an answer begins with reasoning unless the request says otherwise:
`reasoning_effort: "none"`, `thinking: {"type": "disabled"}`, or `chat_template_kwargs` with
`thinking` or `enable_thinking` false. Sampling, stop strings and limits are the engine's business,
so those fields of a request are not passed on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import deepseek_recipe as recipe

from engine.chat.format import ChatFormat, ChatPrompt
from engine.chat.output_parser import END_THINK, THINK, MessageDelta, OutputParser, ToolCallDelta
from engine.chat.tags import Item, SpecialRanges, Tag, TagFinder
from engine.grammar.answer import AnswerStyle, Reasoning, answer_grammar, must_call
from engine.grammar.call_spellings import DSML, ElementSpelling, dsml
from engine.tokenizer.tokenizer import OnBeginning, Tokenizer
from quant.errors import RequestError

# The tags that answers are taken apart by, each with a noncharacter (no text has one) that stands for it
# in what the library reads, so that a tag which is spelled in ordinary tokens stays text.
STAND_INS = {"thinking_start": "\ufdd0", "thinking_end": "\ufdd1", "dsml": "\ufdd2"}
SPELLED = {"thinking_start": THINK, "thinking_end": END_THINK, "dsml": DSML}

MODEL = "served"  # the library knows models by name; ours is an alias for the version


@dataclass(frozen=True)
class Version:
    """A model version of the library and how its prompts are written."""

    model_version: recipe.ModelVersion
    encoding: recipe.DeepseekV4Encoding | recipe.DeepseekV41Encoding
    calls: ElementSpelling


VERSIONS = {
    "deepseek_v4": Version(
        recipe.ModelVersion.DeepseekV4Pro, recipe.DeepseekV4Encoding(), dsml("tool_calls")
    ),
    "deepseek_v41": Version(
        recipe.ModelVersion.DeepseekV41Flash, recipe.DeepseekV41Encoding(), dsml("calls", gap=" ")
    ),
}

# Fields that shape the prompt, in the order in which one is blamed for an error.
PROMPT_FIELDS = ("messages", "reasoning_effort", "thinking", "tools", "tool_choice", "response_format")
UNBOUNDED = 1 << 30  # a context so long that the default stands
# What the library says of a body that it does not take; the last two are about JSON nested too deeply, and
# numbers that are too large for it.
REFUSALS = (ValueError, recipe.ConversionError, RecursionError, OverflowError)


class DeepseekChat(ChatFormat):
    """`ChatFormat` of the model types in VERSIONS."""

    def __init__(self, tokenizer: Tokenizer, model_type: str, default_thinking: bool = True) -> None:
        version = VERSIONS[model_type]
        self._tokenizer = tokenizer
        self._encoding = version.encoding
        self._calls = version.calls
        self._options = recipe.ConversionOptions(default_thinking_mode=default_thinking).with_model_alias(
            MODEL, version.model_version
        )
        end = tokenizer.added_tokens.get(recipe.SpecialToken.Eos.default_str())
        self._stop_token_ids = () if end is None else (end,)

    def render(self, request: Mapping[str, Any], on_beginning: OnBeginning | None = None) -> ChatPrompt:
        body = _prompt_fields(request)
        try:
            converted = self._convert_forcing(body)
        except REFUSALS as error:
            raise RequestError(_message(error), param=self._blame(body)) from None
        prompt = self._encoding.render_conversation(converted.conversation)
        if prompt.image_sources:
            raise RequestError("images are not supported by this server; send text only", param="messages")
        token_ids = self._tokenizer.encode_prompt(
            prompt.prompt, prompt.special_ranges, on_beginning=on_beginning
        )
        options = converted.parsing_options
        options.stop_sequences = []
        style = AnswerStyle(
            Reasoning.OPEN if _opens_reasoning(prompt) else Reasoning.NONE,
            self._calls,
            in_calls=options.starts_in_tool_calls,
            gap="\n\n",
        )
        return ChatPrompt(
            token_ids,
            lambda: DeepseekParser(converted, options, self._tokenizer.added_tokens),
            max_tokens=converted.resolve_max_tokens(len(token_ids), UNBOUNDED),
            stop_token_ids=self._stop_token_ids,
            grammar=answer_grammar(request, self._tokenizer.added_tokens, style),
        )

    def _convert_forcing(self, body: Mapping[str, Any]) -> recipe.ConversationRequest:
        """As `_convert`; behind reasoning, where the library forces no calls, only the grammar does."""
        if must_call(body):
            unforced = self._convert({**body, "tool_choice": "auto"})
            if unforced.conversation.thinking_mode:
                return unforced
        return self._convert(body)

    def _convert(self, body: Mapping[str, Any]) -> recipe.ConversationRequest:
        return recipe.ChatCompletionRequest({"model": MODEL, **body}).convert(self._options)

    def _blame(self, body: Mapping[str, Any]) -> str:
        """The first field without which the request would have been taken."""
        tried: dict[str, Any] = {}
        for field, value in body.items():
            tried[field] = value
            try:
                self._convert_forcing(tried)
            except REFUSALS:
                return field
        return "messages"


class DeepseekParser(OutputParser):
    """The library's stream processor behind our interface.

    tokens    spellings of the vocabulary's added tokens: a tag among them is that token
    """

    def __init__(
        self, converted: recipe.ConversationRequest, options: recipe.ParsingOptions, tokens: Collection[str]
    ) -> None:
        names = {name: tag for name, tag in SPELLED.items() if tag in tokens}
        self._finder = TagFinder(names.values(), tokens)
        self._stand_ins = {tag: STAND_INS[name] for name, tag in names.items()}
        self._spelled = str.maketrans({STAND_INS[name]: tag for name, tag in names.items()})
        self._no_text = str.maketrans(dict.fromkeys(STAND_INS.values(), "\ufffd"))
        options.special_tokens = recipe.SpecialTokens(**{name: STAND_INS[name] for name in names})
        generator = recipe.ChatCompletionRequest.chunk_generator(converted, id="", model=MODEL)
        self._processor = recipe.StreamProcessor(generator, options)
        self._processor.push(recipe.InferenceChunk.ready())
        self._has_tool_calls = False
        self._written: list[str] = []  # what the library read
        self._told: list[str] = []  # what it made reasoning and content

    def push(self, text: str, special_ranges: SpecialRanges | None = None) -> list[MessageDelta]:
        return self._read(self._finder.push(text, special_ranges))

    def finish(self) -> list[MessageDelta]:
        held = self._read(self._finder.finish())
        chunks = self._processor.push(recipe.InferenceChunk.finish(recipe.InferenceFinishReason.Stop))
        deltas = held + self._deltas([*chunks, *self._processor.finish()])
        dropped = self._dropped().translate(self._spelled)
        return [*deltas, MessageDelta(content=dropped)] if dropped else deltas

    def _dropped(self) -> str:
        """What the library passed over: a block in which it found no call, or text between elements."""
        dsml = self._stand_ins.get(DSML, DSML)
        told = "".join(self._told).count(f"<{dsml}")
        parts = "".join(self._written).split(f"<{dsml}", told + 1)
        if len(parts) < told + 2:
            return ""
        block = f"<{dsml}{parts[-1]}"
        if not self._has_tool_calls:
            return block
        parameter = rf'<{dsml} ?parameter name="[^"]*" string="(true|false)">.*?(</{dsml} ?parameter>|\Z)'
        return re.sub(rf"{parameter}|</?{dsml}[^>]*(>|\Z)|</?[{DSML}]*\Z", "", block, flags=re.DOTALL).strip()

    @property
    def has_tool_calls(self) -> bool:
        return self._has_tool_calls

    def _read(self, items: Iterable[Item]) -> list[MessageDelta]:
        text = "".join(
            self._stand_ins[item.spelling] if isinstance(item, Tag) else item.translate(self._no_text)
            for item in items
        )
        self._written.append(text)
        return self._deltas(self._processor.push(recipe.InferenceChunk.text(text, 0))) if text else []

    def _deltas(self, chunks: list[Any]) -> list[MessageDelta]:
        made = [choice["delta"] for chunk in chunks for choice in json.loads(chunk.to_json())["choices"]]
        self._told += [delta.get(kind) or "" for delta in made for kind in ("reasoning_content", "content")]
        deltas = [_delta(delta, self._spelled) for delta in made]
        self._has_tool_calls |= any(delta.tool_calls for delta in deltas)
        return [delta for delta in deltas if delta != MessageDelta()]


def _opens_reasoning(prompt: recipe.RenderedPrompt) -> bool:
    """Whether the prompt ends with the tag itself, not with a message that spells it."""
    start, end = prompt.special_ranges[-1] if prompt.special_ranges else (0, 0)
    return end == len(prompt.prompt) and prompt.prompt[start:end] == THINK


def _delta(delta: Mapping[str, Any], spelled: Mapping[int, str]) -> MessageDelta:
    """One `delta` object of the library's Chat Completions chunks; `spelled` puts tags for what stands in."""
    calls = tuple(
        ToolCallDelta(
            index=call["index"],
            arguments=(call["function"].get("arguments") or "").translate(spelled),
            id=call.get("id"),
            name=call["function"].get("name"),
        )
        for call in delta.get("tool_calls") or ()
    )
    return MessageDelta(
        content=(delta.get("content") or "").translate(spelled),
        reasoning=(delta.get("reasoning_content") or "").translate(spelled),
        tool_calls=calls,
    )


def _prompt_fields(request: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a request that the library is to see, in its own vocabulary."""
    body = {field: request[field] for field in PROMPT_FIELDS if request.get(field) is not None}
    # The library's rules for strict schemas are the vendor's; ours are those of the grammar.
    if described := body.get("response_format", {}).get("json_schema"):
        body["response_format"] = {**body["response_format"], "json_schema": _without_strict(described)}
    if "tools" in body:
        body["tools"] = [
            {**tool, "function": _without_strict(tool["function"])} if "function" in tool else tool
            for tool in body["tools"]
        ]
    # The library has no `developer`, the newer name of `system`.
    body["messages"] = [
        {**message, "role": "system"} if message.get("role") == "developer" else message
        for message in request["messages"]
    ]
    switches = dict(request.get("chat_template_kwargs") or {})
    for name in ("thinking", "enable_thinking"):
        if isinstance(wanted := switches.pop(name, None), bool):
            body.setdefault("thinking", {"type": "enabled" if wanted else "disabled"})
    if switches:
        raise RequestError(
            f"chat_template_kwargs: this model accepts thinking and enable_thinking, not {sorted(switches)}",
            param="chat_template_kwargs",
        )
    return body


def _without_strict(described: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in described.items() if name != "strict"}


def _message(error: Exception) -> str:
    return str(error).removeprefix("invalid request body: ")
