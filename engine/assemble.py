"""Assembles the scheduler's chunks into a batch for the model: sequences laid end to end."""

from __future__ import annotations

from engine.families.base import Batch, Segment
from engine.scheduler import Chunk


def assemble(chunks: list[Chunk]) -> tuple[Batch, list[int]]:
    """The batch of these chunks, and how many logit rows each gets.

    A chunk needs the logits of its last token once its prompt is complete, those of all its tokens where some
    are drafted, and those of every prompt token if their log probabilities were requested. Otherwise, what a
    prompt's tokens have before the prefill's next stop is of use to those after them only.
    """
    ids: list[int] = []
    segments: list[Segment] = []
    rows: list[int] = []
    counts: list[int] = []
    to_come: list[int | None] = []
    for chunk in chunks:
        sequence, length = chunk.sequence, chunk.length
        assert sequence.slot is not None
        first, start, before = sequence.computed, len(ids), len(rows)
        segments.append(Segment(sequence.slot, first, length))
        ids += sequence.token_ids[first : first + chunk.known]
        ids += chunk.drafted
        is_of_answer = length > 1 and not sequence.is_prefilling
        wants_prompt = first < sequence.prompt_length and sequence.params.prompt_logprobs is not None
        is_whole = is_of_answer or wants_prompt
        if is_whole:
            rows += range(start, len(ids))
        elif first + length >= sequence.prefill_length:
            rows.append(len(ids) - 1)
        counts.append(len(rows) - before)
        to_come.append(None if is_whole else sequence.next_stop - first - length)
    return Batch(ids, tuple(segments), None if len(rows) == len(ids) else rows, tuple(to_come)), counts
