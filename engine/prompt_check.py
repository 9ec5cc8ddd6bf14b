"""What a prompt must be, whichever engine computes it."""

from __future__ import annotations

from collections.abc import Sequence

from engine.sampling.params import SamplingParams
from quant.errors import RequestError


def check_prompt(ids: Sequence[int], params: SamplingParams, vocab_size: int, max_context: int) -> None:
    """Raises RequestError where the prompt is empty, has ids outside the vocabulary or does not leave room
    for a token (code `context_length_exceeded`), or its parameters name such ids."""
    if not ids:
        raise RequestError("the prompt is empty; it must have at least one token", param="prompt")
    if min(ids) < 0 or max(ids) >= vocab_size:
        raise RequestError(f"token ids must lie between 0 and {vocab_size - 1}", param="prompt")
    for token_id in (*params.logit_bias, *params.stop_token_ids):
        if not 0 <= token_id < vocab_size:
            param = "logit_bias" if token_id in params.logit_bias else "stop_token_ids"
            raise RequestError(f"{param}: token id {token_id} is outside the vocabulary", param=param)
    answer = params.max_tokens or max(params.min_tokens, 1)
    wanted = len(ids) + answer
    if wanted > max_context:
        raise RequestError(
            f"this model's maximum context length is {max_context} tokens, but {wanted} were "
            f"requested ({len(ids)} in the prompt, {answer} for the answer); "
            "shorten the prompt or ask for fewer tokens",
            param="max_tokens" if len(ids) < max_context else "messages",
            code="context_length_exceeded",
        )
