"""Bodies of /tokenize and /detokenize, strictly typed; fields that nobody declared are ignored."""

from __future__ import annotations

from typing import Any, Self

from pydantic import Field, model_validator

from quant.errors import RequestError
from server.openai.messages import Body, Items, Message, Tool
from server.openai.refused import TEMPLATE_REFUSED, TOKENIZE_REFUSED, refuse_fields


class TokenizeRequest(Body):
    """Body of /tokenize: a text, or a conversation as the model would see it."""

    prompt: str | None = None
    messages: Items[Message] | None = None
    tools: Items[Tool] | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False
    content: str | None = None
    add_special: bool | None = None
    with_pieces: bool = False

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_changes_meaning(cls, data: Any) -> Any:
        return refuse_fields(data, TOKENIZE_REFUSED)

    @model_validator(mode="after")
    def _read_as_llama_cpp_does(self) -> Self:
        if self.content is not None and self.prompt is None:
            self.prompt = self.content
            self.add_special_tokens = bool(self.add_special)
        elif self.add_special is not None:
            self.add_special_tokens = self.add_special
        return self

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise RequestError("send either prompt or messages", param="prompt")
        for i, message in enumerate(self.messages or []):
            message.check(f"messages[{i}]")
        return self


class ApplyTemplateRequest(Body):
    """Body of /apply-template: what makes the prompt of a chat."""

    model: str | None = None
    messages: Items[Message] = Field(min_length=1)
    tools: Items[Tool] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_changes_meaning(cls, data: Any) -> Any:
        return refuse_fields(data, TEMPLATE_REFUSED)


class DetokenizeRequest(Body):
    """Body of /detokenize."""

    tokens: list[int]
