"""What steps need beside weights and KV: activations, logits, a recorded step's buffers."""

from __future__ import annotations

from dataclasses import replace

from memory.experts.store import BLOCK_TOKENS
from memory.planner.placement import Workload
from memory.planner.shape import ModelShape

# Steps pass activations from buffer to buffer, those of attention so many tokens at a time.
ACTIVATION_BUFFERS = 2
# Of a recorded step: its rows at most, how often a token's activations its buffers hold, and latents of a
# part.
RECORDED_ROWS = 16
RECORDED_ACTIVATIONS = 3
RECORDED_LATENTS = 32
RECORDED_SHARES = 64  # programs that share what rows attend to, where that is all, whatever there is of it


def workspace_bytes(shape: ModelShape, workload: Workload) -> int:
    """Activations and logits of the largest step."""
    tokens = max(workload.prefill_chunk, workload.sequences)
    buffers = ACTIVATION_BUFFERS * min(tokens, BLOCK_TOKENS) * shape.activation_bytes
    held = max(0, tokens - BLOCK_TOKENS) * (shape.held_bytes or ACTIVATION_BUFFERS * shape.activation_bytes)
    return buffers + held + 4 * shape.vocab_size * workload.sequences


def lent_bytes(shape: ModelShape, workload: Workload) -> int:
    """Of a chunk's workspace on a GPU, what its experts' slots lend: all that a short chunk does not need."""
    short = replace(workload, prefill_chunk=min(workload.prefill_chunk, BLOCK_TOKENS))
    return workspace_bytes(shape, workload) - workspace_bytes(shape, short)


def recorded_bytes(shape: ModelShape, workload: Workload) -> int:
    """Buffers of a recorded decode step on a GPU, for all rows that it may have: what a token has in hand,
    logits, a score of each entry that a sequence may have, and attention, in parts of some latents for each
    head, or in as many parts for all rows together as programs share latents that were not chosen; and for
    its share of another GPU's layers, a token's inputs twice, its experts' inner values, and their biases."""
    kv = [layer.kv for layer in shape.layers]
    scores = 6 * workload.context // min((k.seen_ratio for k in kv if k.scan_bytes), default=workload.context)
    attention = max(
        (k.fixed_flops + (k.selected or 0) * k.selected_flops for k in kv), default=0
    )  # x 4 bytes
    in_hand = RECORDED_ACTIVATIONS * shape.activation_bytes + 4 * shape.vocab_size
    inner = shape.top_k * max(layer.expert.parameters // (3 * shape.hidden) for layer in shape.layers)
    share = 4 * (2 * shape.hidden + inner + 2 * shape.top_k)
    whole = max((k.selected_flops for k in kv if k.seen_ratio and k.selected is None), default=0)
    rows = in_hand + scores + attention // RECORDED_LATENTS + share
    return RECORDED_ROWS * rows + RECORDED_SHARES * whole + shape.copied_bytes
