"""Body of /v1/messages, and its translation into the chat request that the engine's side knows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from quant.errors import RequestError
from server.anthropic.tools import AnyMessagesTool, functions_of, others_in
from server.openai.messages import (
    Body,
    Content,
    FunctionCall,
    Items,
    Message,
    TextPart,
    ToolCall,
    check_parts,
    required,
    seen,
    unsupported,
)
from server.openai.refused import MESSAGES_REFUSED, OUTPUT_REFUSED, refuse_fields
from server.openai.requests import MAX_SALT, UNLIMITED, ChatRequest, ReasoningEffort, SamplingFields
from server.serving.call_input import written_input


class Block(Body):
    """One block of a message's content. Which fields it needs depends on its type."""

    type: str
    text: str | None = None
    thinking: str | None = None
    id: str | None = None
    name: str | None = None
    input: Any = None
    tool_use_id: str | None = None
    content: Content | None = None


_Blocks = Annotated[
    Annotated[str, Tag("<string>")] | Annotated[Items[Block], Tag("<blocks>")],
    Discriminator(lambda value: "<blocks>" if isinstance(value, list) else "<string>"),
]


class Turn(Body):
    """One message."""

    role: Literal["user", "assistant", "system"]
    content: _Blocks


class MessagesToolChoice(Body):
    """Whether the model calls tools, and which."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Body):
    """Whether the model reasons first. Without this field it does not."""

    type: Literal["enabled", "adaptive", "disabled"]
    display: Literal["summarized", "omitted"] | None = None


class OutputFormat(Body):
    """The form that the text of an answer must have."""

    type: Literal["json_schema"]
    json_schema: dict[str, Any] = Field(alias="schema")


class OutputConfig(Body):
    """How much the model reasons, and the form of its text."""

    effort: ReasoningEffort | None = None
    format: OutputFormat | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_changes_meaning(cls, data: Any) -> Any:
        return refuse_fields(data, OUTPUT_REFUSED, "output_config.")


class CountRequest(Body):
    """Body of /v1/messages/count_tokens: what makes the prompt."""

    model: str | None = None
    messages: Items[Turn] = Field(min_length=1)
    system: Content | None = None
    tools: Items[AnyMessagesTool] | None = None
    tool_choice: MessagesToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_changes_meaning(cls, data: Any) -> Any:
        return refuse_fields(data, MESSAGES_REFUSED)

    @property
    def ignored_tools(self) -> list[str]:
        """Types of the tools that the model is not shown."""
        return others_in(self.tools)

    def as_chat(self) -> ChatRequest:
        """The same request in the terms of Chat Completions.

        Raises RequestError or ValidationError for what does not fit together.
        """
        return ChatRequest.model_validate(self._chat_fields())

    def _chat_fields(self) -> dict[str, Any]:
        config = self.output_config or OutputConfig()
        reasons = self.thinking is not None and self.thinking.type != "disabled"
        choice = self.tool_choice or MessagesToolChoice(type="auto")
        return {
            "model": self.model,
            "messages": self._conversation(),
            "tools": functions_of(self.tools) or None,
            "tool_choice": _choice(choice) if self.tool_choice else None,
            "parallel_tool_calls": not choice.disable_parallel_tool_use,
            "thinking": {"type": "enabled" if reasons else "disabled"},
            "reasoning_effort": config.effort if reasons else None,
            "response_format": config.format and _response_format(config.format),
        }

    def _conversation(self) -> list[Message]:
        messages = []
        calls: set[str | None] = set()  # that a turn may answer; turns of one role in a row are one
        if self.system is not None:
            check_parts(self.system, "system")
            messages.append(Message(role="system", content=self.system))
        for i, turn in enumerate(self.messages):
            path = f"messages[{i}].content"
            _check_results(calls, turn, path)
            if turn.role == "assistant":
                if i and self.messages[i - 1].role != "assistant":
                    calls = set()
                calls |= {block.id for block in _blocks(turn) if block.type == "tool_use"}
                messages.append(_assistant_message(turn.content, path))
            else:
                messages += _user_messages(turn.role, turn.content, path)
        if self.messages[-1].role == "assistant" and not messages[-1].tool_calls:
            messages[-1].prefix = True
        return messages


class MessagesRequest(CountRequest, SamplingFields):
    """Body of /v1/messages."""

    max_tokens: int = Field(ge=UNLIMITED)
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    cache_salt: str | None = Field(None, max_length=MAX_SALT)

    @property
    def hides_thinking(self) -> bool:
        """True where the blocks of the reasoning are to be empty."""
        return self.thinking is not None and self.thinking.display == "omitted"

    def _chat_fields(self) -> dict[str, Any]:
        return (
            super()._chat_fields()
            | {name: getattr(self, name) for name in SamplingFields.model_fields}
            | {
                "stop": self.stop_sequences or self.stop,
                "max_completion_tokens": self.max_tokens,
                "cache_salt": self.cache_salt,
            }
        )


def _check_results(known: set[str | None], turn: Turn, path: str) -> None:
    """Raise RequestError, in the words of Anthropic's API, for a result of a call that was not made."""
    for i, block in enumerate(_blocks(turn)):
        if block.type == "tool_result" and block.tool_use_id is not None and block.tool_use_id not in known:
            raise RequestError(
                f"{path}[{i}]: unexpected `tool_use_id` found in `tool_result` blocks: {block.tool_use_id}; "
                "each must have its `tool_use` block in the message before",
                param=f"{path}[{i}].tool_use_id",
            )


def _blocks(turn: Turn) -> list[Block]:
    return turn.content if isinstance(turn.content, list) else []


def _user_messages(
    role: Literal["user", "system"], content: str | list[Block], path: str
) -> Iterable[Message]:
    """Results of tools are messages of their own, which follow their calls at once; then comes what the user
    says."""
    if isinstance(content, str):
        return [Message(role=role, content=content)]
    results: list[Message] = []
    said: list[TextPart] = []
    for i, block in enumerate(content):
        if block.type == "tool_result":
            result = seen(block.content) or ""
            check_parts(result, f"{path}[{i}].content")
            call_id = required(block.tool_use_id, f"{path}[{i}].tool_use_id")
            results.append(Message(role="tool", tool_call_id=call_id, content=result))
        else:
            said.append(_text_part(block, f"{path}[{i}]"))
    return [*results, Message(role=role, content=said or "")] if said or not results else results


def _assistant_message(content: str | list[Block], path: str) -> Message:
    if isinstance(content, str):
        return Message(role="assistant", content=content)
    parts: list[TextPart] = []
    thoughts: list[str] = []
    calls: list[ToolCall] = []
    for i, block in enumerate(content):
        match block.type:
            case "thinking":
                thoughts.append(required(block.thinking, f"{path}[{i}].thinking"))
            case "redacted_thinking":
                pass  # nobody here can read it
            case "tool_use":
                arguments = written_input(required(block.input, f"{path}[{i}].input"))
                function = FunctionCall(name=required(block.name, f"{path}[{i}].name"), arguments=arguments)
                calls.append(ToolCall(id=required(block.id, f"{path}[{i}].id"), function=function))
            case _:
                parts.append(_text_part(block, f"{path}[{i}]"))
    return Message(
        role="assistant",
        content=parts or "",
        reasoning_content="".join(thoughts) if thoughts else None,
        tool_calls=calls or None,
    )


def _text_part(block: Block, path: str) -> TextPart:
    if block.type != "text":
        raise RequestError(
            f"{path}: {unsupported(block.type).replace('parts', 'blocks')}",
            param=f"{path}.type",
            code="unsupported_content_part",
        )
    return TextPart(type="text", text=required(block.text, f"{path}.text"))


def _choice(choice: MessagesToolChoice) -> Any:
    if choice.type == "tool":
        return {"type": "function", "function": {"name": required(choice.name, "tool_choice.name")}}
    return "required" if choice.type == "any" else choice.type


def _response_format(wanted: OutputFormat) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": wanted.json_schema}}
