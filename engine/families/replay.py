"""A recorded step of a batch of new tokens, one or a few of each sequence."""

from __future__ import annotations

from contextlib import nullcontext

import torch

from engine.families.base import Batch, KvCache
from engine.layers.recorded_experts import RecordedExperts
from quant.kernels.cpu.program import Program


def replay(program: Program, routed: RecordedExperts | None, batch: Batch, cache: KvCache) -> torch.Tensor:
    """Logits of `batch.logit_rows`, `[rows, vocab_size]`, by a program that decodes with `cache`.

    routed  its routed experts; None for a model without
    """
    slots, positions = batch.places()
    with nullcontext() if routed is None else routed.running(program, len(slots)):
        program.run(slots, positions, batch.ids)
    wanted = None if batch.wanted is None else batch.logit_rows
    return program.logits(wanted, shared=cache.shares_logits)
