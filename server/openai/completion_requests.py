"""Body of /v1/completions, strictly typed; fields that nobody declared are ignored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Self

from pydantic import Discriminator, Field, Tag, model_validator

from quant.errors import RequestError
from server.openai.messages import Items
from server.openai.refused import COMPLETIONS_REFUSED, REFUSED
from server.openai.requests import GenerationRequest


def _prompt_kind(value: object) -> str:
    if not isinstance(value, list):
        return "<string>"
    if value and isinstance(value[0], list):
        return "<prompts of ids>"
    return "<ids>" if value and not isinstance(value[0], str) else "<strings>"


_Prompt = Annotated[
    Annotated[str, Tag("<string>")]
    | Annotated[Items[str], Tag("<strings>")]
    | Annotated[list[int], Tag("<ids>")]
    | Annotated[Items[list[int]], Tag("<prompts of ids>")],
    Discriminator(_prompt_kind),
]


class CompletionRequest(GenerationRequest):
    """Body of /v1/completions."""

    refused = REFUSED | COMPLETIONS_REFUSED

    prompt: _Prompt
    add_special_tokens: bool | None = None
    skip_special_tokens: bool | None = None
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=20)
    best_of: int | None = None

    @model_validator(mode="after")
    def _check_completion_fields(self) -> Self:
        if self.best_of not in (None, self.choices):
            raise RequestError(
                f"best_of must equal n ({self.choices}): answers are not ranked",
                param="best_of",
                code="unsupported_parameter",
            )
        if not self.prompts:
            raise RequestError("prompt must not be empty", param="prompt")
        return self

    def as_format(self) -> dict[str, Any]:
        """The fields that say what the answer must match."""
        names = {"response_format", "structured_outputs"}
        return self.model_dump(include=names, exclude_none=True, by_alias=True)

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, one or more, each as text or as token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        ids = [i for i in self.prompt if isinstance(i, int)]
        return [ids] if ids else [prompt for prompt in self.prompt if not isinstance(prompt, int)]


def check_ids(ids: Sequence[int], vocab_size: int, param: str) -> None:
    """Raise RequestError where one of `ids` is not in the vocabulary."""
    wrong = next((i for i in ids if not 0 <= i < vocab_size), None)
    if wrong is not None:
        raise RequestError(
            f"{param}: {wrong} is not a token id; this vocabulary has ids 0 to {vocab_size - 1}", param=param
        )
