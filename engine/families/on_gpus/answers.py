"""What the processor answers GPUs that run a recorded step: outputs of experts that none of them holds."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch

from memory.experts.coordinator import Coordinator
from memory.experts.store import ExpertStore
from quant.kernels.interface import NO_EXTRAS, ExpertExtras


def coordinator_of(store: ExpertStore, limit: float, extras: Sequence[ExpertExtras] = ()) -> Coordinator:
    """Answers from the expert store. An expert that has reached a GPU since the step began is computed there,
    on a stream of its own: the GPU's may be waiting for this very answer.

    limit   of the activation: see `MoeCall.swiglu_limit`
    extras  what each layer's experts have beyond that, if any has
    """
    devices = [table.tier.device for table in store.slots.gpus]
    streams = [
        torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        for device in devices
        if device.type == "cuda"
    ]

    @torch.inference_mode()
    def answer(layer: int, ids: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        with ExitStack() as apart:
            for stream in streams:
                apart.enter_context(torch.cuda.stream(stream))
            return store.outputs(layer, ids, x, limit, extras[layer] if extras else NO_EXTRAS)

    def foresee(layer: int, guess: list[int]) -> None:
        if store.wants_guesses(layer):
            store.prefetch(layer, guess)

    return Coordinator(answer, foresee)
