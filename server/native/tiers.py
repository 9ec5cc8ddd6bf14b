"""Where the model's experts are, and how often each is used: what the page's picture of the machine shows."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic_core import to_json

from server.serving.handling import service_of
from server.serving.service import Served

router = APIRouter()
ON_DISK = "nvme"


@router.get("/tiers")
async def tiers(request: Request) -> Response:
    """The tier of each routed expert by layer, and how often it was used."""
    return Response(to_json(_tiers(service_of(request).served)), media_type="application/json")


def _tiers(served: Served) -> dict[str, Any]:
    """`layers[n].experts` are indices into `tiers`, by expert; `uses` are counts that fade, null where nobody
    counts because nothing ever moves. Layers without routed experts are left out."""
    model = served.loaded.model
    held = model.expert_tiers()
    gpus = sorted(name for name in model.tier_bytes if name.startswith("vram"))
    names = [*gpus, *(name for name in model.tier_bytes if name not in gpus), ON_DISK]
    numbers = {name: number for number, name in enumerate(names)}
    uses = model.expert_uses()
    return {
        "object": "tiers",
        "model": served.name,
        "tiers": names,
        "layers": [
            {
                "layer": layer,
                "experts": [numbers[name] for name in experts],
                "uses": [round(count, 2) for count in uses[layer]] if uses else None,
            }
            for layer, experts in enumerate(held)
            if experts
        ],
    }
