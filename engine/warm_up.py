"""What a GPU's kernels need before the first request: to be compiled."""

from __future__ import annotations

from collections.abc import Sequence

from engine.families.base import Batch, Model

# Tokens that meet every size of tile that the kernels have.
LENGTHS = (1, 16, 32, 64)


def warm_up(model: Model, most_tokens: int, lengths: Sequence[int] = LENGTHS) -> None:
    """Compute tokens that nobody asked for, so many at once, `most_tokens` at most; nothing of them is kept.

    Triton compiles a kernel when it is first used, which takes seconds for each size of tile. Equal tokens
    choose equal experts, so these meet every size, too.
    """
    for length in lengths:
        if length <= most_tokens:
            ids = [model.info.vocab_size // 2] * length
            model.forward(Batch.of([(0, 0, ids)], all_logits=True), model.new_cache(1, length))
