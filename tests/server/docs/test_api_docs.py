"""docs/api.md leaves nothing out: every route, field and setting stands there."""

from __future__ import annotations

import re

import pytest
from fastapi.routing import APIRoute

from server.anthropic.requests import MessagesRequest
from server.app import ROUTERS
from server.openai.completion_requests import CompletionRequest
from server.openai.refused import (
    CHAT_REFUSED,
    COMPLETIONS_REFUSED,
    MESSAGES_REFUSED,
    REFUSED,
    RESPONSES_REFUSED,
    TOKENIZE_REFUSED,
)
from server.openai.requests import ChatRequest
from server.responses.requests import ResponsesRequest
from tests.server.harness import ROOT

PAGE = (ROOT / "docs" / "api.md").read_text()


def test_every_route_is_documented() -> None:
    routes = [route for router in ROUTERS for route in router.routes]

    paths = {
        re.sub(r"\{\w+(:path)?\}", "{id}", route.path) for route in routes if isinstance(route, APIRoute)
    }
    assert {path for path in paths if path not in PAGE} == set()
    assert len(paths) == 32


@pytest.mark.parametrize(
    "names",
    [
        ChatRequest.model_fields,
        CompletionRequest.model_fields,
        ResponsesRequest.model_fields,
        MessagesRequest.model_fields,
        REFUSED | CHAT_REFUSED | COMPLETIONS_REFUSED | TOKENIZE_REFUSED,
        RESPONSES_REFUSED,
        MESSAGES_REFUSED,
    ],
    ids=["chat", "completions", "responses", "messages", "refused", "refused responses", "refused messages"],
)
def test_every_field_is_documented(names: dict[str, object]) -> None:
    assert [name for name in names if f"`{name}`" not in PAGE] == []
