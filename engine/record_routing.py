"""Runs a model over text and records its routers' choices."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from engine.families.base import Batch, Model, Trace
from memory.experts.traces import RoutingTrace
from quant.errors import ConfigError

CHUNK = 256


def record_routing(model: Model, ids: Sequence[int], on_progress: Callable[[int], None]) -> RoutingTrace:
    """The experts chosen for each of `ids`, read as one text (in pieces of the model's context).

    `on_progress` is told how many were read. Raises ConfigError for a model without routed experts.
    """
    context = min(model.info.max_context, 4096)
    cache = model.new_cache(1, context)
    chosen: list[torch.Tensor] = []
    for begin in range(0, len(ids), context):
        piece = ids[begin : begin + context]
        cache.reset(0)
        for start in range(0, len(piece), CHUNK):
            trace = Trace()
            part = piece[start : start + CHUNK]
            model.forward(Batch.of([(0, start, part)]), cache, trace)
            if not any(map(_is_choice, trace.values)):
                raise ConfigError(
                    f"{model.info.name}: this model has no routed experts, so there is nothing to record"
                )
            chosen.append(chosen_experts(trace))
            on_progress(begin + start + len(part))
    return RoutingTrace(torch.cat(chosen))


def chosen_experts(trace: Trace) -> torch.Tensor:
    """The routers' choices of every layer in the one forward of `trace`, `[tokens, layers, top_k]`."""
    names = sorted(filter(_is_choice, trace.values), key=lambda name: int(name.rpartition(".")[2]))
    return torch.stack([trace.values[name][0] for name in names], dim=1)


def _is_choice(name: str) -> bool:
    return name.startswith("router_ids.")
