"""Assembles the scheduler's chunks into a batch for the model: sequences laid end to end."""

from __future__ import annotations

import functools

import numpy as np
import torch

from engine.families.base import Batch, Segment
from engine.scheduler import Chunk


def assemble(chunks: list[Chunk]) -> tuple[Batch, list[int]]:
    """The batch of these chunks, and how many logit rows each gets.

    A chunk needs the logits of its last token once its prompt is complete, and those of every prompt token if
    their log probabilities were requested.
    """
    ids: list[int] = []
    segments: list[Segment] = []
    rows: list[int] = []
    counts: list[int] = []
    for chunk in chunks:
        sequence = chunk.sequence
        assert sequence.slot is not None
        start = len(ids)
        ids += sequence.token_ids[sequence.computed : sequence.computed + chunk.length]
        segments.append(Segment(sequence.slot, sequence.computed, chunk.length))
        if sequence.is_prefilling and sequence.params.prompt_logprobs is not None:
            wanted = list(range(start, len(ids)))
        elif sequence.computed + chunk.length >= sequence.prompt_length:
            wanted = [len(ids) - 1]
        else:
            wanted = []
        rows += wanted
        counts.append(len(wanted))
    # Steps without prompts need all rows, and every new tensor costs time there, from NumPy the least.
    wanted_rows = _all_rows(len(ids)) if len(rows) == len(ids) else torch.tensor(rows, dtype=torch.int64)
    token_ids = torch.from_numpy(np.array(ids, dtype=np.int64))
    return Batch(token_ids, tuple(segments), wanted_rows), counts


@functools.lru_cache(maxsize=64)
def _all_rows(count: int) -> torch.Tensor:
    return torch.arange(count)
