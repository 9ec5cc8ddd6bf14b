"""Compiles a GPU's kernels before the first request."""

from __future__ import annotations

import gc
from collections.abc import Sequence

from engine.families.base import Batch, Model

# Batch sizes that exercise every tile size of the kernels; the last one is of bfloat16 products.
LENGTHS = (1, 16, 32, 64, 128)


def warm_up(model: Model, most_tokens: int, lengths: Sequence[int] = LENGTHS) -> None:
    """Compute dummy tokens in batches of these sizes, at most `most_tokens`; the results are discarded.

    Triton compiles a kernel when it is first used, which takes seconds for each size of tile. Equal tokens
    choose equal experts, so these meet every size, too.
    """
    cache = model.new_cache(1, min(most_tokens, max(lengths)))
    for length in lengths:
        if length <= most_tokens:
            cache.reset(0)
            ids = [model.info.vocab_size // 2] * length
            model.forward(Batch.of([(0, 0, ids)], all_logits=True), cache)
    del cache
    gc.collect()  # a cache and its recorded step refer to each other, and no plan has memory for a second one
