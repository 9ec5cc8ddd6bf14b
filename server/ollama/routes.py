"""The routes under /api that Ollama's clients know."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from hashlib import sha256
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from engine.chat.format import ChatPrompt
from engine.chat.output_parser import PlainParser
from engine.grammar.answer import content_grammar
from server.http.errors import OLLAMA_PATH
from server.ollama.reply import OllamaReply, now
from server.ollama.requests import OllamaChatRequest, OllamaGenerateRequest, OllamaShowRequest
from server.openai.requests import ChatRequest
from server.serving.embeddings import no_embeddings
from server.serving.handling import read_body, render, respond, service_of
from server.serving.naming import own_names
from server.serving.service import Served

router = APIRouter(prefix=OLLAMA_PATH)

# The version whose interface this is; clients ask for the one that brought what they need.
VERSION = "0.12.6"
# What a field of the chat request is called here.
_NAMES = {
    "max_tokens": "options.num_predict",
    "response_format": "format",
    "reasoning_effort": "think",
    "thinking": "think",
} | {name: f"options.{name}" for name in ("temperature", "top_p", "top_k", "min_p", "seed", "stop")}


@router.get("/version")
async def ollama_version() -> dict[str, str]:
    """The version of Ollama whose interface this is."""
    return {"version": VERSION}


@router.get("/tags")
async def ollama_models(request: Request) -> dict[str, Any]:
    """The model, once for each of its names."""
    served = service_of(request).served
    return {"models": [_listed(served, name) for name in (served.name, *served.aliases)]}


@router.get("/ps")
async def ollama_running(request: Request) -> dict[str, Any]:
    """The model: it stays loaded."""
    served = service_of(request).served
    elsewhere = sum(n for tier, n in served.loaded.model.tier_bytes.items() if tier not in ("dram", "nvme"))
    never = datetime.now(UTC) + timedelta(days=365)
    more = {
        "size_vram": elsewhere,
        "expires_at": never.isoformat().replace("+00:00", "Z"),
        "context_length": served.engine.max_context,
    }
    return {"models": [_listed(served, served.name) | more]}


@router.post("/show")
async def ollama_model(request: Request) -> dict[str, Any]:
    """What the model is and can do."""
    body = await read_body(request, OllamaShowRequest)
    served = _named(request, body.model or body.name)
    info = served.loaded.model.info
    capabilities = ["completion", *(["tools", "thinking"] if served.loaded.chat is not None else [])]
    family = info.family
    return {
        "modelfile": "",
        "parameters": "",
        "template": served.loaded.tokenizer.chat_template or "",
        "details": _details(served),
        "model_info": {
            "general.architecture": family,
            "general.parameter_count": _parameters(served),
            f"{family}.context_length": served.engine.max_context,
        },
        "capabilities": capabilities,
        "modified_at": _created(served),
    }


@router.post("/chat")
async def ollama_chat(request: Request) -> Response:
    """The assistant's next message in a conversation."""
    body = await read_body(request, OllamaChatRequest)
    served = _named(request, body.model)
    if not body.messages:
        return _loaded(served, {"message": {"role": "assistant", "content": ""}})
    with own_names(_NAMES):
        chat = body.as_chat()
        prompt = await render(request, chat, served)
        return await respond(request, OllamaReply(chat, prompt, served), body.is_stream)


@router.post("/generate")
async def ollama_generate(request: Request) -> Response:
    """An answer to a text, or its continuation."""
    body = await read_body(request, OllamaGenerateRequest)
    served = _named(request, body.model)
    if not body.prompt:
        return _loaded(served, {"response": ""})
    with own_names(_NAMES):
        if body.raw or served.loaded.chat is None:
            chat, prompt = _raw(body, served)
        else:
            chat = body.as_chat()
            prompt = await render(request, chat, served)
        return await respond(request, OllamaReply(chat, prompt, served, as_text=True), body.is_stream)


@router.post("/embed")
async def ollama_embed(request: Request) -> Response:
    """Refused, with the reason."""
    raise no_embeddings()


def _raw(body: OllamaGenerateRequest, served: Served) -> tuple[ChatRequest, ChatPrompt]:
    """The text itself as the prompt."""
    completion = body.as_completion()
    tokenizer = served.loaded.tokenizer
    ids = tokenizer.encode(body.prompt or "", add_special_tokens=True)
    grammar = content_grammar(completion.as_format(), tokenizer.added_tokens)
    chat = ChatRequest.model_validate(
        {"messages": [{"role": "user", "content": ""}]}
        | {name: value for name, value in body.sampling_fields().items() if name != "response_format"}
    )
    return chat, ChatPrompt(ids, PlainParser, grammar=grammar)


def _named(request: Request, model: str | None) -> Served:
    """The model; Ollama's clients write `:latest` behind names without a tag."""
    return service_of(request).named(None if model is None else model.removesuffix(":latest"))


def _loaded(served: Served, empty: dict[str, Any]) -> Response:
    """What a request without a prompt asks for is that the model be loaded."""
    return JSONResponse(
        {"model": served.name, "created_at": now(), **empty, "done": True, "done_reason": "load"}
    )


def _listed(served: Served, name: str) -> dict[str, Any]:
    return {
        "name": name,
        "model": name,
        "modified_at": _created(served),
        "size": sum(served.loaded.model.tier_bytes.values()),
        "digest": sha256(served.name.encode(errors="replace")).hexdigest(),
        "details": _details(served),
    }


def _details(served: Served) -> dict[str, Any]:
    family = served.loaded.model.info.family
    formats = {part.format for part in served.loaded.components if part.kind == "routed_experts"}
    formats = formats or {part.format for part in served.loaded.components if part.kind == "dense"}
    return {
        "parent_model": "",
        "format": "loci",
        "family": family,
        "families": [family],
        "parameter_size": f"{_parameters(served) / 1e9:.1f}B",
        "quantization_level": ", ".join(sorted(formats)),
    }


def _parameters(served: Served) -> int:
    return sum(part.parameters for part in served.loaded.components)


def _created(served: Served) -> str:
    return datetime.fromtimestamp(served.created, UTC).isoformat().replace("+00:00", "Z")
