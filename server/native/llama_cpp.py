"""Routes that llama.cpp's server and vLLM have and their clients read: all of them only tell."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from server.native.requests import ApplyTemplateRequest
from server.native.routes import loci_version
from server.openai.requests import ChatRequest
from server.serving.embeddings import no_embeddings
from server.serving.handling import read_body, render, service_of
from server.serving.service import Served

router = APIRouter()


@router.get("/props")
async def properties(request: Request) -> dict[str, Any]:
    """Settings of the server, as llama.cpp tells them."""
    service = service_of(request)
    served = service.served
    tokenizer = served.loaded.tokenizer
    return {
        "default_generation_settings": {"n_ctx": served.engine.max_context, "params": _defaults(served)},
        "total_slots": service.max_sequences,
        "model_alias": served.name,
        "model_path": served.name,
        "modalities": {"vision": False, "audio": False},
        "chat_template": tokenizer.chat_template or "",
        "bos_token": tokenizer.special_tokens.get("bos_token", ""),
        "eos_token": tokenizer.special_tokens.get("eos_token", ""),
        "build_info": f"loci {loci_version()}",
        "is_sleeping": False,
    }


@router.get("/slots")
async def slots(request: Request) -> list[dict[str, Any]]:
    """What is computed at once, as llama.cpp tells it: how many of the places are taken, not by whom."""
    service = service_of(request)
    running = service.served.engine.stats().running
    context = service.served.engine.max_context
    return [
        {"id": i, "n_ctx": context, "is_processing": i < running, "speculative": False}
        for i in range(service.max_sequences)
    ]


@router.post("/apply-template")
async def apply_template(request: Request) -> dict[str, str]:
    """The text that the model would see of a conversation."""
    body = await read_body(request, ApplyTemplateRequest)
    served = service_of(request).named(body.model)
    chat = ChatRequest.model_validate(body.model_dump(exclude_none=True))
    prompt = await render(request, chat, served)
    return {"prompt": served.loaded.tokenizer.decode(prompt.token_ids)}


@router.get("/tokenizer_info")
async def tokenizer_info(request: Request) -> dict[str, Any]:
    """The tokenizer's configuration, as vLLM tells it."""
    served = service_of(request).served
    tokenizer = served.loaded.tokenizer
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "vocab_size": tokenizer.size,
        "model_max_length": served.engine.max_context,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "added_tokens_decoder": {
            str(i): {"content": text, "special": i in tokenizer.special_ids}
            for text, i in tokenizer.added_tokens.items()
        },
        "chat_template": tokenizer.chat_template,
        **tokenizer.special_tokens,
    }


@router.post("/v1/embeddings")
async def embeddings(request: Request) -> None:
    """Refused, with the reason."""
    raise no_embeddings()


def _defaults(served: Served) -> dict[str, Any]:
    """What is used of the sampling settings where a request says nothing."""
    sampling = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    return {**sampling, **served.loaded.sampling}
