"""Request bodies of the OpenAI interface, strictly typed; fields that nobody declared are ignored.

docs/api.md says of each field whether it is accepted, ignored or refused, and why.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Discriminator, Field, ModelWrapValidatorHandler, PrivateAttr, Tag, model_validator

from engine.sampling.params import SamplingParams
from quant.errors import RequestError
from server.openai.messages import (
    AllowedToolChoice,
    Body,
    Items,
    Message,
    NamedToolChoice,
    Tool,
    ToolChoice,
)
from server.openai.refused import (
    CHAT_REFUSED,
    REFUSED,
    THINKING_REFUSED,
    Refused,
    refuse_fields,
    refuse_windows,
    unless,
)
from server.openai.tools import shown_tools

MAX_STOP = 16
MAX_N = 128
MAX_SALT = 256
MAX_TOLD = 5  # wrong keys that an error names
MAX_DIGITS = 20  # of a token id
UNLIMITED = -1  # as `max_tokens`: as many as the context holds

# One error per union instead of one per member: the discriminator looks at the value's type first.
# Tags in angle brackets are left out of the paths that errors name.
_Strings = Annotated[
    Annotated[str, Tag("<string>")] | Annotated[list[str], Tag("<strings>")],
    Discriminator(lambda value: "<strings>" if isinstance(value, list) else "<string>"),
]


ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class StreamOptions(Body):
    """What a stream contains beside the answer."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class SchemaFormat(Body):
    """A schema that the answer must match; `strict: false` passes over what cannot be enforced."""

    name: str | None = Field(None, min_length=1, max_length=64)
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """`text`, any JSON object, or JSON by a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: SchemaFormat | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema", exclude=True)

    @model_validator(mode="after")
    def _check_schema(self) -> Self:
        if self.schema_ is not None and self.json_schema is None and self.type != "text":
            # As llama.cpp and others write it, with either type.
            self.type = "json_schema"
            self.json_schema = SchemaFormat(schema=self.schema_)
        if self.type != "json_schema" and (self.json_schema or self.schema_) is not None:
            text = f"response_format has a schema, which type {self.type!r} does not take; use json_schema"
            raise RequestError(text, param="response_format.type")
        if self.type == "json_schema" and self.json_schema is None:
            raise RequestError("response_format.json_schema is required", param="response_format.json_schema")
        return self


class StructuredOutputs(Body):
    """What the answer must match, in one of five ways: vLLM's extension."""

    json_: dict[str, Any] | None = Field(None, alias="json")
    json_object: Literal[True] | None = None
    regex: str | None = Field(None, min_length=1)
    choice: list[Annotated[str, Field(min_length=1)]] | None = Field(None, min_length=1)
    grammar: str | None = Field(None, min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_changes_meaning(cls, data: Any) -> Any:
        names = ("structural_tag", "whitespace_pattern", "disable_any_whitespace")
        refused = {name: unless("white space and tags are fixed") for name in names}
        more = {"disable_additional_properties": unless("say additionalProperties: false in the schema")}
        return refuse_fields(data, refused | more, "structured_outputs.")

    @model_validator(mode="after")
    def _check_one(self) -> Self:
        if len(self.model_dump(exclude_none=True)) != 1:
            names = ", ".join(field.alias or name for name, field in type(self).model_fields.items())
            raise RequestError(f"structured_outputs takes exactly one of {names}", param="structured_outputs")
        return self


def _ranging(low: float, high: float) -> Any:
    """A field whose range stands in the OpenAPI document; SamplingParams checks it."""
    return Field(None, json_schema_extra={"minimum": low, "maximum": high})


class SamplingFields(Body):
    """How tokens are chosen and when to stop: OpenAI's fields and the usual extensions."""

    temperature: float | None = _ranging(0, 10)
    top_p: float | None = _ranging(0, 1)
    top_k: int | None = None
    min_p: float | None = _ranging(0, 1)
    seed: int | None = None
    stop: _Strings | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    frequency_penalty: float | None = _ranging(-2, 2)
    presence_penalty: float | None = _ranging(-2, 2)
    repetition_penalty: float | None = _ranging(0.01, 10)
    logit_bias: dict[str, float] | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_penalties_cannot_do(cls, data: Any) -> Any:
        return refuse_windows(data)


class GenerationRequest(SamplingFields):
    """What chat and plain completions have in common; `refused` are fields that it cannot honour."""

    refused: ClassVar[Mapping[str, Refused]]

    model: str | None = None
    max_tokens: int | None = None
    n: int | None = Field(None, ge=1, le=MAX_N)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    modalities: list[str] | None = None
    return_progress: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    prompt_logprobs: int | None = Field(None, ge=0, le=20)
    cache_salt: str | None = Field(None, max_length=MAX_SALT)

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_changes_meaning(cls, data: Any) -> Any:
        return refuse_fields(data, cls.refused)

    @model_validator(mode="after")
    def _check_common_fields(self) -> Self:
        if self.structured_outputs and self.response_format and self.response_format.type != "text":
            raise RequestError(
                "send response_format or structured_outputs, not both", param="structured_outputs"
            )
        if self.modalities is not None and self.modalities != ["text"]:
            raise RequestError(
                "modalities other than ['text'] are not supported",
                param="modalities",
                code="unsupported_parameter",
            )
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options needs stream: true", param="stream_options")
        if self.stream and self.prompt_logprobs is not None:
            raise RequestError("prompt_logprobs needs stream: false", param="prompt_logprobs")
        if isinstance(self.stop, list) and len(self.stop) > MAX_STOP:
            raise RequestError(f"stop takes up to {MAX_STOP} strings, got {len(self.stop)}", param="stop")
        return self

    @property
    def counts_always(self) -> bool:
        """True where every chunk of a stream has the token counts so far."""
        return self.stream_options is not None and bool(self.stream_options.continuous_usage_stats)

    @property
    def choices(self) -> int:
        """How many answers to each prompt."""
        return self.n or 1

    @property
    def wants_usage(self) -> bool:
        """True where a stream must end with the token counts."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def sampling(
        self,
        vocab_size: int,
        choice: int,
        defaults: Mapping[str, Any],
        stop_token_ids: Sequence[int] = (),
        **extra: Any,
    ) -> SamplingParams:
        """Sampling settings of the given choice: choice i has seed + i.

        `defaults` are the model's own, for what the request does not say.

        `stop_token_ids` are the prompt dialect's own; like the model's they give way to ignore_eos.

        Raises RequestError naming the field that is out of range.
        """
        # Other servers draw a new seed for -1.
        seed = None if self.seed in (None, -1) else self.seed + choice
        # The smallest share of the probability is that of the likeliest token.
        is_greedy = self.top_p == 0
        implied = () if self.ignore_eos else tuple(stop_token_ids)
        fields = {
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": 1.0 if is_greedy else self.top_p,
            "top_k": 1 if is_greedy else 0 if self.top_k == -1 else self.top_k,  # -1 is off in vLLM, SGLang
            "min_p": self.min_p,
            "seed": seed,
            "frequency_penalty": self.frequency_penalty,
            "presence_penalty": self.presence_penalty,
            "repetition_penalty": self.repetition_penalty,
            "logit_bias": self._logit_bias(vocab_size),
            # Forms send an empty field where nothing was filled in.
            "stop": tuple(
                text for text in ([self.stop] if isinstance(self.stop, str) else self.stop or ()) if text
            ),
            "stop_token_ids": tuple(self.stop_token_ids or ()) + implied,
            "include_stop": self.include_stop_str_in_output,
            "ignore_eos": self.ignore_eos,
            "min_tokens": self.min_tokens,
        } | extra
        given = {name: value for name, value in fields.items() if value is not None}
        return SamplingParams(**{**defaults, **given})

    def _logit_bias(self, vocab_size: int) -> dict[int, float]:
        bias: dict[int, float] = {}
        given = self.logit_bias or {}
        digits = MAX_DIGITS  # Python refuses to convert thousands of them
        if wrong := [
            key for key in given if not key.isdecimal() or len(key) > digits or int(key) >= vocab_size
        ]:
            told = ", ".join(repr(key[:40]) for key in wrong[:MAX_TOLD])
            told += " and more" if len(wrong) > MAX_TOLD else ""
            what = "is not a token id" if len(wrong) == 1 else "are not token ids"
            raise RequestError(
                f"logit_bias: {told} {what}; this vocabulary has ids 0 to {vocab_size - 1}",
                param="logit_bias",
            )
        for key, value in given.items():
            if int(key) in bias:
                raise RequestError(
                    f"logit_bias: {key!r} repeats token {int(key)}; list each token once",
                    param="logit_bias",
                )
            bias[int(key)] = value
        return bias


MOST_PREDICTED = 100_000  # characters of an answer that a client foretells


class ChatRequest(GenerationRequest):
    """Body of /v1/chat/completions."""

    refused = REFUSED | CHAT_REFUSED

    messages: Items[Message] = Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: Items[Tool] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: ReasoningEffort | None = None
    thinking: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None
    prediction: Any = None

    _ignored_tools: list[str] = PrivateAttr(default_factory=list)
    _custom_tools: set[str] = PrivateAttr(default_factory=set)

    @model_validator(mode="wrap")
    @classmethod
    def _show_functions_only(cls, data: Any, read: ModelWrapValidatorHandler[Self]) -> Self:
        """Tools that take text become functions, those that the vendor's servers run are left out."""
        shown, ignored, custom = shown_tools(data)
        request = read(shown)
        request._ignored_tools, request._custom_tools = ignored, custom
        return request

    @property
    def ignored_tools(self) -> list[str]:
        """Types of the tools that the model is not shown."""
        return self._ignored_tools

    @property
    def custom_tools(self) -> set[str]:
        """Names of the functions that stand for tools which take text."""
        return self._custom_tools

    @model_validator(mode="after")
    def _check_chat_fields(self) -> Self:
        self._check_ending()
        refuse_fields(self.thinking, THINKING_REFUSED, "thinking.")
        if self.thinking is not None and self.thinking.get("type") not in ("enabled", "disabled"):
            raise RequestError("thinking.type must be enabled or disabled", param="thinking.type")
        for i, message in enumerate(self.messages):
            message.check(f"messages[{i}]")
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs: true", param="top_logprobs")
        if self.tool_choice not in (None, "none", "auto") and not self.tools:
            raise RequestError("tool_choice needs tools", param="tool_choice")
        known = [tool.function.name for tool in self.tools or []]
        for wanted in self._chosen_tools:
            if wanted not in known:
                raise RequestError(
                    f"tool_choice names {wanted!r}, which is not in tools", param="tool_choice"
                )
        return self

    @property
    def _chosen_tools(self) -> list[str]:
        """Names of the tools that `tool_choice` names."""
        if isinstance(self.tool_choice, NamedToolChoice):
            return [self.tool_choice.function.name]
        if isinstance(self.tool_choice, AllowedToolChoice):
            return [tool.function.name for tool in self.tool_choice.allowed_tools.tools]
        return []

    def _check_ending(self) -> None:
        """vLLM's way to say whether the last message is complete; ours is its `prefix`."""
        last = self.messages[-1]
        if self.continue_final_message:
            if last.role != "assistant" or self.add_generation_prompt:
                raise RequestError(
                    "continue_final_message needs a last message of the assistant, and no "
                    "add_generation_prompt",
                    param="continue_final_message",
                )
            last.prefix = True
        elif self.add_generation_prompt is False and not last.prefix:
            raise RequestError(
                "add_generation_prompt: false is not supported: an answer either starts a new message or "
                "continues the last one (continue_final_message)",
                param="add_generation_prompt",
                code="unsupported_parameter",
            )

    @property
    def predicted_text(self) -> str:
        """What the client expects the answer to be; a hint, of which anything but text is ignored."""
        content = self.prediction.get("content") if isinstance(self.prediction, dict) else None
        parts = content if isinstance(content, list) else [{"text": content}]
        texts = (part.get("text") for part in parts if isinstance(part, dict))
        return "".join(text for text in texts if isinstance(text, str))[:MOST_PREDICTED]

    @property
    def answer_tokens(self) -> int | None:
        """Most tokens an answer may have, UNLIMITED for what the context holds; `max_tokens` is the old name
        of `max_completion_tokens`."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def as_prompt(self) -> dict[str, Any]:
        """What a ChatFormat needs to render the conversation."""
        names = {
            "messages",
            "tools",
            "tool_choice",
            "parallel_tool_calls",
            "response_format",
            "structured_outputs",
            "reasoning_effort",
            "thinking",
            "chat_template_kwargs",
        }
        body = self.model_dump(include=names, exclude_none=True, by_alias=True)
        if not self.tools:
            body.pop("tools", None)
            body.pop("tool_choice", None)
        if isinstance(self.tool_choice, AllowedToolChoice):
            body["tools"] = [tool for tool in body["tools"] if tool["function"]["name"] in self._chosen_tools]
            body["tool_choice"] = self.tool_choice.allowed_tools.mode
        return body
